"""Settings of every test run."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's products as in the processes that accelerate starts


import torch

torch.set_num_threads(1)  # networks this small are slower on more
