"""Settings of every test run."""

import gc
import os
import re
from functools import cache
from pathlib import Path

# as in the processes that accelerate starts; networks this small are slower on more, in the processes of tests too
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


import pytest
import torch

torch.set_num_threads(1)

PROCESSES = re.compile(r"\bsubprocess\b|\blaunching\b|\"scripts\"")  # the ways by which tests start them


@cache
def starts_processes(path: Path) -> bool:
    return bool(PROCESSES.search(path.read_text(encoding="utf-8")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start processes: they are the longest, and none should be left for the end."""
    items.sort(key=lambda item: not starts_processes(item.path))


def pytest_collection_finish() -> None:
    """Exempt all imported modules from garbage collection, which takes a Trainer half a second at every start."""
    gc.collect()
    gc.freeze()
