"""Gram matrices on a CPU, in numpy's plainest calls.

These cost a tenth of torch's, which counts where a step has dozens of small matrices; and a product of a matrix with
its own transpose is half the work in numpy alone. Its products run on one thread, and torch takes over where it has
more than two: numpy's own threads wait busily on the processors that torch's need, and a step takes twice as long.
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

# Centring the Gram matrix instead of the features spares a pass over them, and multiplies its rounding by the energy of
# the mean relative to that of the signal: up to here that stays about 1e-6 of a similarity, and below 1e-4 of its
# gradient. A gradient in these features is a slope's product with them, mean and all, hence less of it there.
SAFE_OFFSET = 12
SAFE_WITH_GRADIENT = 4
FAINTEST = float(np.finfo(np.float32).tiny)  # energy that is no dead layer's
LARGEST_OFFSET = 1000  # beyond, a layer may be dead, and the mean's own rounding counts
PROBED = 1024  # features of a wide layer that tell which of the two ways will do
BLOCK = 4096  # features that are centred at a time, so that they stay in the cache
MOST_THREADS = 2  # of torch's, on which its whole product takes as long as numpy's half on one


def outer(x: Tensor) -> Tensor:
    """``x xᵀ`` of ``(…, n, d)``; on a CPU by numpy, which knows that half of it is enough."""
    if not for_numpy(x):
        return x @ x.mT
    array = x.numpy()
    with one_thread():
        return torch.from_numpy(array @ array.swapaxes(-1, -2))


def for_numpy(x: Tensor) -> bool:
    """Whether numpy is to do it: on a CPU, if torch has not many threads there, and is not to see what is done, to
    compile it or to count it."""
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return x.device.type == "cpu" and not watched and torch.get_num_threads() <= MOST_THREADS


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, products of numpy run on the calling thread alone.

    (`ThreadpoolController.limit` does as much, and takes as long as a small matrix does. Like it, this may have no
    effect on OpenBLAS in another thread than the first that asked.)
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
    """Gram matrix of float32 features ``(n, d)``, centred and scaled as `kernels.gram` does, with the fewest passes.

    Args:
        array: the features.
        keep: whether a gradient will be wanted.

    Returns:
        The matrix, what it was multiplied by, and the features that a gradient is to be made of (None: those given);
        or None where their mean is too large for that.
    """
    n, width = array.shape
    if n < 2:
        return None
    if width <= n:  # then the features are the smaller matrix
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
    energy, _ = _centre(kernel)  # again, for what rounding of the mean left behind
    if not (FAINTEST < energy < math.inf and float(np.vdot(mean, mean)) <= LARGEST_OFFSET * energy):
        return None
    kernel *= 1 / energy
    return kernel, 1 / energy, array


def _offset_of(array: Any) -> float:
    """The energy of the features' mean relative to that of the signal."""
    mean = np.add.reduce(array, 0) / len(array)
    offset = float(np.vdot(mean, mean))
    energy = float(np.einsum("ij,ij->", array, array)) / len(array) - offset
    return offset / energy if energy > 0 else math.inf


def _centre(kernel: Any) -> tuple[float, float]:
    """Centre a Gram matrix in place; its mean diagonal afterwards, and what that was more before."""
    mean = np.add.reduce(kernel, 0) / len(kernel)
    offset = float(np.add.reduce(mean)) / len(kernel)
    energy = float(kernel.trace()) / len(kernel) - offset
    kernel -= mean[:, None]
    kernel -= mean - np.float32(offset)
    return energy, offset


def _kernel_in_blocks(array: Any, mean: Any) -> Any:
    """Gram matrix of the features less their mean, of which there is never more than a block."""
    kernel: Any = 0
    room = np.empty((len(array), min(BLOCK, len(mean))), array.dtype)
    for start in range(0, len(mean), BLOCK):
        block = array[:, start : start + BLOCK]
        centred = np.subtract(block, mean[start : start + BLOCK], out=room[:, : block.shape[1]])
        kernel += centred @ centred.T
    return kernel


def features_on_cpu(array: Array) -> tuple[Any, float] | None:
    """Features ``(n, d)``, centred and scaled as `kernels.centred_features` does, and the scale; None as above.

    No library of products is asked, so that its threads need not be held.
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
