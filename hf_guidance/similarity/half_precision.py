"""Products of features on a GPU's tensor cores, for features that were computed in half precision.

Two half-precision numbers have an exact product in float32. Only the sum of the products is rounded. Centring the Gram
matrix afterwards amplifies this rounding by the energy of the features' mean relative to that of their signal. The
features' own rounding is amplified in the same way, and is larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_guidance.similarity.matrices import exact_float32

HALF = (torch.bfloat16, torch.float16)
TOGETHER = 2**26  # most bytes of such products to hold before they are summed
PIECE = 2048  # features to sum on a tensor core; its longer sums are coarser than those of float32
SINCE = (8, 0)  # compute capability from which NVIDIA GPUs have tensor cores for all of these types


def for_tensor_cores(x: Tensor, in_region: bool = False) -> bool:
    """Tell whether tensor cores can multiply features without losing precision.

    They can if the features are in half precision, or in float32 inside an autocast region, like a residual stream.

    Args:
        x: Features.
        in_region: The features come from a network that runs in the present autocast region.
    """
    if x.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(x.device) < SINCE:
        return False
    return x.dtype in HALF or (in_region and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"))


def outer(x: Tensor) -> Tensor:
    """Compute `x xᵀ` in float32, for features `(…, n, d)`."""
    with exact_float32(x.device, "tf32"):
        pieces = x.shape[-1] // PIECE
        if x.ndim > 2 or pieces < 2:
            return _product(x, x.mT)
        first, rest = x[:, : pieces * PIECE], x[:, pieces * PIECE :]
        parts = first.unflatten(1, (pieces, PIECE)).transpose(0, 1).split(max(1, TOGETHER // max(1, 4 * len(x) ** 2)))
        gram = _product(parts[0], parts[0].mT).sum(0)
        for more in parts[1:]:
            gram += _product(more, more.mT).sum(0)
        return gram.add_(_product(rest, rest.mT)) if rest.shape[1] else gram


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in HALF:
        return a @ b
    if a.device.type != "cuda":  # only CUDA can return products in another dtype
        return a.float() @ b.float()
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Compute `G x` in the dtype of x, for a float32 matrix `(…, n, n)` whose rows sum to zero.

    Rounded to bfloat16 the rows no longer sum to zero, and the mean of x would leak in. Two bfloat16 matrices, which
    hold 16 bits together, avoid that.
    """
    with exact_float32(x.device):
        if x.dtype != torch.bfloat16:  # in float16 the matrix might underflow or overflow
            return (matrix @ x.float()).to(x.dtype)
        high = matrix.to(x.dtype)
        low = (matrix - high).to(x.dtype)
        return low @ x + high @ x if x.ndim > 2 else torch.addmm(low @ x, high, x)
