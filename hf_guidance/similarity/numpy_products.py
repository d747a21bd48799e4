"""Gram matrices on a CPU, in plain numpy calls.

A numpy call costs a tenth of a torch call, which matters when a step has dozens of small matrices. Only numpy computes
half of a product of a matrix with its own transpose. Its products run on one thread: numpy's threads wait busily on the
cores that torch's threads need, and a step would take twice as long. So torch takes over where it has more than two
threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Array: TypeAlias = NDArray[np.float32]

# Centring the Gram matrix instead of the features saves a pass over them. It amplifies the rounding by the energy of
# the mean relative to that of the signal. Up to these limits the error is about 1e-6 of a similarity and below 1e-4 of
# its gradient. The gradient multiplies a slope by the features with their mean, so its limit is lower.
SAFE_OFFSET = 12
SAFE_WITH_GRADIENT = 4
FAINTEST = float(np.finfo(np.float32).tiny)  # smallest energy of a layer that is not dead
LARGEST_OFFSET = 1000  # above this a layer may be dead, and the rounding of the mean matters
PROBED = 1024  # features of a wide layer to choose between the two ways by
BLOCK = 4096  # features to centre at a time, so that they stay in the cache
MOST_THREADS = 2  # torch threads up to which numpy's half product on one thread is as fast as torch's whole one


def outer(x: Tensor) -> Tensor:
    """Compute `x xᵀ` of `(…, n, d)`; on a CPU with numpy, which computes only half of it."""
    if not for_numpy(x):
        return x @ x.mT
    array = x.numpy()
    with one_thread():
        return torch.from_numpy(array @ array.swapaxes(-1, -2))


def for_numpy(x: Tensor) -> bool:
    """Tell whether to use numpy: on a CPU where torch has few threads, and does not compile or trace what runs."""
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return x.device.type == "cpu" and not watched and torch.get_num_threads() <= MOST_THREADS


@contextmanager
def one_thread() -> Iterator[None]:
    """Run numpy's products on the calling thread alone inside this context.

    `ThreadpoolController.limit` does the same, but takes as long as a small matrix does. Like it, this may not affect
    OpenBLAS in a thread other than the first one that used it.
    """
    held = [(library, threads) for library in _blas() if (threads := library.get_num_threads()) not in (None, 1)]
    for library, _ in held:
        library.set_num_threads(1)
    try:
        yield
    finally:
        for library, threads in held:
            library.set_num_threads(threads)


@functools.cache
def _blas() -> list[Any]:
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


@one_thread()
def kernel_on_cpu(array: Array, keep: bool) -> tuple[Any, float, Any] | None:
    """Compute the centred, scaled Gram matrix of float32 features as `grams.gram` does, with the fewest passes.

    Args:
        array: features `(n, d)`.
        keep: whether a gradient will be needed.

    Returns:
        The matrix, its factor, and the features for the gradient (None: the given ones). None if their mean is too
        large for this method.
    """
    n, width = array.shape
    if n < 2:
        return None
    if width <= n:  # the features are then the smaller matrix
        if (found := features_on_cpu(array)) is None:
            return None
        centred, inverse = found
        return centred @ centred.T, inverse, centred
    safe = SAFE_WITH_GRADIENT if keep else SAFE_OFFSET
    if width < 4 * PROBED or _offset_of(array[:, :PROBED]) <= safe:
        kernel = array @ array.T
        energy, offset = _centre(kernel)
        if FAINTEST < energy < math.inf and offset <= safe * energy:
            kernel *= 1 / energy
            return kernel, 1 / energy, None
    mean = np.add.reduce(array, 0) / n
    if keep:
        array = array - mean
        kernel = array @ array.T
    else:
        kernel = _kernel_in_blocks(array, mean)
    energy, _ = _centre(kernel)  # again, to remove the rounding of the mean
    if not (FAINTEST < energy < math.inf and float(np.vdot(mean, mean)) <= LARGEST_OFFSET * energy):
        return None
    kernel *= 1 / energy
    return kernel, 1 / energy, array


def _offset_of(array: Any) -> float:
    """Compute the energy of the features' mean relative to that of the signal."""
    mean = np.add.reduce(array, 0) / len(array)
    offset = float(np.vdot(mean, mean))
    energy = float(np.einsum("ij,ij->", array, array)) / len(array) - offset
    return offset / energy if energy > 0 else math.inf


def _centre(kernel: Any) -> tuple[float, float]:
    """Centre a Gram matrix in place. Return its mean diagonal afterwards, and by how much it fell."""
    mean = np.add.reduce(kernel, 0) / len(kernel)
    offset = float(np.add.reduce(mean)) / len(kernel)
    energy = float(kernel.trace()) / len(kernel) - offset
    kernel -= mean[:, None]
    kernel -= mean - np.float32(offset)
    return energy, offset


def _kernel_in_blocks(array: Any, mean: Any) -> Any:
    """Compute the Gram matrix of the features minus their mean, one block of centred features at a time."""
    kernel: Any = 0
    room = np.empty((len(array), min(BLOCK, len(mean))), array.dtype)
    for start in range(0, len(mean), BLOCK):
        block = array[:, start : start + BLOCK]
        centred = np.subtract(block, mean[start : start + BLOCK], out=room[:, : block.shape[1]])
        kernel += centred @ centred.T
    return kernel


def features_on_cpu(array: Array) -> tuple[Any, float] | None:
    """Centre and scale features `(n, d)` as `grams.centred_features` does.

    It calls no BLAS, so that BLAS threads need not be limited.

    Returns:
        The features and their factor, or None as `kernel_on_cpu` does.
    """
    if not len(array):
        return None
    mean = np.add.reduce(array, 0) / len(array)
    centred = array - mean
    energy, offset = float(np.einsum("ij,ij->", centred, centred)) / len(array), float(np.einsum("i,i->", mean, mean))
    if not (FAINTEST < energy < math.inf and offset <= SAFE_OFFSET * energy):
        return None
    centred *= energy**-0.5
    return centred, energy**-0.5
