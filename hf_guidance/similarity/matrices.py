"""Products, centring and sums of matrices, exact to float32, on any device.

On a CPU, numpy computes `x xᵀ`: of the libraries at hand only numpy computes half of it, as it is symmetric. It runs on
one thread, because its threads wait busily on the cores that torch's threads need. So torch takes over where it has
more than two threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Centring a Gram matrix instead of the features saves a copy of them. It amplifies rounding by the energy of the mean
# relative to that of the signal. Up to these limits a similarity is off by 1e-6 and its gradient by less than 1e-4.
SAFE_OFFSET, SAFE_WITH_GRADIENT = 12, 4
LARGEST_OFFSET = 1000  # above this a layer may be dead, and the rounding of the mean matters
FAINTEST = float(np.finfo(np.float32).tiny)  # smallest energy of a layer that is not dead
TINY = 1e-20  # far below the energy of a living layer; for roots and quotients in your own measures
PROBED = 1024  # features by which the size of the mean is guessed
BLOCK = 4096  # features to centre at a time, so that they stay in the processor's cache
NUMPY_THREADS = 2  # torch threads up to which numpy's half product on one thread is as fast as torch's


@contextmanager
def exact_float32(device: torch.device, precision: str = "ieee") -> Iterator[None]:
    """Switch autocast and TF32 off. A Gram matrix rounded to 8 or 10 bits gives another similarity.

    Args:
        device: Device of the products.
        precision: `ieee` for all bits, or `tf32` for 10 bits on a GPU, enough for features computed in half precision.
    """
    with (
        torch.autocast(device.type, enabled=False),
        _products_in(precision) if device.type == "cuda" else nullcontext(),
    ):
        yield


@contextmanager
def _products_in(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"  # falls back to torch.backends' setting; shows whether `before` came from there
    before = "none" if matmul.fp32_precision == before else before
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


# ------------------------------------------------------------------------------------------------ centring and sums


def center(gram: Tensor) -> Tensor:
    """Subtract row and column means of symmetric matrices `(…, n, n)`; differentiable."""
    mean = gram.mean(-1, keepdim=True)
    return gram - mean - (mean.mT - mean.mean(-2, keepdim=True))


def center_in_place(gram: Tensor) -> Tensor:
    """Do as `center` in place: `H K H` with `H = I − 11ᵀ/n`."""
    mean = gram.mean(-1, keepdim=True)
    return gram.sub_(mean).sub_(mean.mT - mean.mean(-2, keepdim=True))


def u_center(gram: Tensor) -> Tensor:
    """U-centre symmetric matrices `(…, n, n)`, n ≥ 3. Their products estimate HSIC without bias, up to scale.

    Source: Székely & Rizzo 2014, "Partial distance correlation with methods for dissimilarities", eq. 2.2.
    """
    n = gram.shape[-1]
    centred = gram.clone()
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    mean = centred.sum(-1, keepdim=True) / (n - 2)
    mean = mean - mean.sum(-2, keepdim=True) / (2 * (n - 1))
    centred -= mean + mean.mT
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    return centred


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum the products of entries of two matrices `(…, n, d)`, row by row: one long sum on a CPU loses digits."""
    return torch.linalg.vecdot(a, b).sum(-1)


def over_matrix(number: Tensor) -> Tensor:
    """Append two axes to numbers `(…)` so that they spread over matrices `(…, n, d)`."""
    return number[..., None, None]


def plus_product(a: Tensor, b: Tensor, c: Tensor, alpha: float = 1.0) -> Tensor:
    """Compute `a + alpha b c` of matrices, or of equally many of them, `(…, n, d)`."""
    return (torch.addmm if a.ndim == 2 else torch.baddbmm)(a, b, c, alpha=alpha)


# --------------------------------------------------------------------------------------------------------- products


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
    return x.device.type == "cpu" and not watched and torch.get_num_threads() <= NUMPY_THREADS


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


@np.errstate(all="ignore")  # what is not finite is noticed elsewhere
@one_thread()
def centred_product(x: Tensor, with_gradient: bool) -> tuple[Tensor, float, Tensor | None] | None:
    """Compute `x̃ x̃ᵀ` of float32 features `(n, d)` on a CPU, without a centred copy of the features.

    Args:
        x: Features, with their mean.
        with_gradient: Whether the backward multiplies these features. The mean then has to be smaller to be left in.

    Returns:
        The centred matrix, its mean diagonal, and the mean if the backward must subtract it. None if the mean is too
        large for this, or the features are too faint.
    """
    array: Any = x.numpy()
    n, width = array.shape
    if n < 2:
        return None
    if width < 4 * PROBED or _offset_of(array[:, :PROBED]) <= SAFE_OFFSET:
        gram = array @ array.T
        energy, offset = _center(gram)
        left_in = FAINTEST < energy < math.inf and offset <= SAFE_OFFSET * energy
        if left_in and (offset <= SAFE_WITH_GRADIENT * energy or not with_gradient):
            return torch.from_numpy(gram), energy, None
        if left_in:
            return torch.from_numpy(gram), energy, x.mean(0)
    mean = np.add.reduce(array, 0) / n
    gram = _product_in_blocks(array, mean)
    energy, _ = _center(gram)  # again, to remove the rounding of the mean
    if not (FAINTEST < energy < math.inf and float(np.vdot(mean, mean)) <= LARGEST_OFFSET * energy):
        return None
    return torch.from_numpy(gram), energy, torch.from_numpy(mean)


def _offset_of(array: Any) -> float:
    """Compute the energy of the features' mean relative to that of the signal."""
    mean = np.add.reduce(array, 0) / len(array)
    offset = float(np.vdot(mean, mean))
    energy = float(np.einsum("ij,ij->", array, array)) / len(array) - offset
    return offset / energy if energy > 0 else math.inf


def _center(gram: Any) -> tuple[float, float]:
    """Centre a Gram matrix in place. Return its mean diagonal afterwards, and by how much it fell."""
    mean = np.add.reduce(gram, 0) / len(gram)
    offset = float(np.add.reduce(mean)) / len(gram)
    energy = float(gram.trace()) / len(gram) - offset
    gram -= mean[:, None]
    gram -= mean - np.float32(offset)
    return energy, offset


def _product_in_blocks(array: Any, mean: Any) -> Any:
    """Compute the product of the features minus their mean, one block of centred features at a time."""
    gram: Any = 0
    for start in range(0, len(mean), BLOCK):
        centred = array[:, start : start + BLOCK] - mean[start : start + BLOCK]
        gram += centred @ centred.T
    return gram
