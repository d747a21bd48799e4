"""Random states of torch on every device in use, of Python and of numpy: read, set, and kept as they are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> list[Tensor]:
    """Return torch's random states: of the CPU, and of the accelerator that this process uses."""
    return [device.get_rng_state() for device in _devices()]


def set_random_state(state: Sequence[Tensor]) -> None:
    """Set torch's random states to what `random_state` returned."""
    for device, own in zip(_devices(), state, strict=True):
        device.set_rng_state(own)


def drawn_from() -> tuple[object, ...]:
    """Return the states that torch, Python and numpy draw from: equal twice if nothing was drawn in between."""
    of_numpy = np.random.get_state(legacy=False)["state"]
    of_torch = (state.numpy().tobytes() for state in random_state())
    return (*of_torch, random.getstate(), of_numpy["key"].tobytes(), of_numpy["pos"])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the random states of torch, Python and numpy when the context ends."""
    of_torch, of_python, of_numpy = random_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        set_random_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _devices() -> list[Any]:
    """Return the torch modules of the devices that have a random state of their own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch] if accelerator is None else [torch, torch.get_device_module(accelerator)]
