"""Small networks and rows that the tests of the cost of guidance share."""

import torch
from builders import linear

from hf_guidance.experiments.cost.meters import operations
from hf_guidance.experiments.cost.random_rows import random_tokens
from hf_guidance.targets.vision import vision_target

CPU = torch.device("cpu")
CONVS = linear(guide_layers=["Conv2d"])


def operations_of(work, *args, **kwargs):
    with operations() as count:
        work(*args, **kwargs)
    return count.value


def texts():
    return random_tokens(8, 6, 17)


def fcn():
    torch.manual_seed(0)
    return vision_target("deep_fcn", 32, width=8, depth=3, num_labels=4)
