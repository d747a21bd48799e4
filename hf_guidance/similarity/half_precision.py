"""Products of features on the tensor cores of a GPU, where these were computed in half precision anyway.

Two numbers in half precision have an exact product in float32; what is lost is the rounding of the products' sum. A
Gram matrix that is centred afterwards multiplies it by the energy of the features' mean relative to that of their
signal. So it does with the features' own rounding, which is the larger of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
TOGETHER = 2**26  # bytes of the products of such pieces, that are made before they are summed
PIECE = 2048  # features that are summed on a tensor core, whose sum of very many is coarser than float32's
SINCE = (8, 0)  # the compute capability of NVIDIA's GPUs that have such cores for all of these types


def for_tensor_cores(x: Tensor, in_region: bool = False) -> bool:
    """Whether features are no finer than what tensor cores multiply: in half precision, or, as a residual stream is, in
    float32 in a region of autocast.

    Args:
        in_region: they come from the network that this region is of.
    """
    if x.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(x.device) < SINCE:
        return False
    return x.dtype in HALF or (in_region and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"))


def precision_of(x: Tensor) -> torch.dtype:
    """What such features were computed in."""
    return x.dtype if x.dtype in HALF else torch.get_autocast_dtype(x.device.type)


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Switch autocast off, and on a GPU make products of float32 with all of their bits (``ieee``), or with 10 of them
    (``tf32``), which are more than those of what was computed in half precision."""
    with torch.autocast(device.type, enabled=False), _precision(precision) if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def _precision(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"  # that of all of torch.backends, which it may have been
    before = "none" if matmul.fp32_precision == before else before
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def outer(x: Tensor) -> Tensor:
    """``x xᵀ`` in float32, of features ``(n, d)`` or of several layers' ``(layers, n, d)``."""
    with float32_products("tf32", x.device):
        pieces = x.shape[-1] // PIECE
        if x.ndim > 2 or pieces < 2:
            return _product(x, x.mT)
        whole, rest = x[:, : pieces * PIECE], x[:, pieces * PIECE :]
        parts = whole.unflatten(1, (pieces, PIECE)).transpose(0, 1).split(max(1, TOGETHER // max(1, 4 * len(x) ** 2)))
        kernel = _product(parts[0], parts[0].mT).sum(0)
        for more in parts[1:]:
            kernel += _product(more, more.mT).sum(0)
        return kernel.add_(_product(rest, rest.mT)) if rest.shape[1] else kernel


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in HALF:
        return a @ b
    if a.device.type != "cuda":  # which alone can give a product of a type of its own
        return a.float() @ b.float()
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """``G x`` in x's own precision, for a float32 matrix ``(…, n, n)`` whose rows sum to zero.

    Rounded to bfloat16 they would not, and x's mean would come through: two such matrices hold 16 bits.
    """
    with float32_products("ieee", x.device):
        if x.dtype != torch.bfloat16:  # a float16 matrix might be all zeros, or infinite
            return (matrix @ x.float()).to(x.dtype)
        high = matrix.to(x.dtype)
        low = (matrix - high).to(x.dtype)
        return low @ x + high @ x if x.ndim > 2 else torch.addmm(low @ x, high, x)
