"""Batches of small layers, whose Gram matrices or `Thin` features are computed in a few large operations.

For a small layer, launching an operation costs more than the arithmetic. On a GPU that holds for most layers, on a CPU
for very small or sketched ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_guidance.similarity import half_precision
from hf_guidance.similarity.grams import (
    Context,
    exact_float32,
    scaled_kernels,
    scaled_product,
    without_second_derivative,
)
from hf_guidance.similarity.half_precision import for_tensor_cores
from hf_guidance.similarity.matrices import center_in_place
from hf_guidance.similarity.narrow import Thin

SMALL = 2**22  # most bytes in float32 of a layer's features or Gram matrix for the layer to wait for the others
SMALL_CONSTANT = 2**20  # the same for features that nothing else keeps in memory
SMALL_ON_CPU = 2**16  # the same on a CPU
SMALL_THIN = 2**20  # bytes of a Gram matrix above which few features replace it on a GPU too
MOST = 2**27  # most bytes to copy or compute together


@dataclass(frozen=True)
class Later:
    """Layer whose Gram matrix, or `Thin` features, will be computed later.

    Args:
        values: features `(n, d)`; or their products `(n, n)`, if the features are many and constant.
        precision: dtype in which the features were computed.
        multiplied: whether the values are products.
        thin: whether the layer becomes `Thin` features instead of a Gram matrix.
    """

    values: Tensor
    precision: torch.dtype
    multiplied: bool = False
    thin: bool = False

    @property
    def size(self) -> int:
        """Return the bytes in float32 of the features or of their Gram matrix, whichever is larger.

        Thin layers have no Gram matrix.
        """
        return 4 * (self.values.numel() if self.thin else len(self.values) * max(self.values.shape))

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return a key that is equal for layers that can be computed together."""
        return self.multiplied, self.thin, self.precision, self.values.dtype, self.values.device, self.values.shape


Kernel = Tensor | Later


def later(x: Tensor, precision: torch.dtype, keep_copy: bool = False, thin: bool = False) -> Later | None:
    """Choose what to keep of a layer until its network has run.

    Args:
        x: features `(n, d)`.
        precision: dtype in which the features were computed.
        keep_copy: as in `grams.gram`.
        thin: whether these features may replace their Gram matrix, which is larger.

    Returns:
        The layer to compute later, or None if it is better computed at once.
    """
    n = len(x)
    thin = thin and not (4 * n * n <= SMALL_THIN and starts_slowly(x))
    copied_in_vain = thin and keep_copy and x.device.type == "cpu"  # one layer at a time is as fast and needs no copy
    if not starts_slowly(x, thin) or copied_in_vain:
        return None
    constant = not (x.requires_grad and torch.is_grad_enabled())
    if constant and not thin and for_tensor_cores(x, in_region=True):
        return Later(half_precision.outer(x.detach()), half_precision.precision_of(x), multiplied=True)
    if Later(x, precision, thin=thin).size > (SMALL_CONSTANT if constant else SMALL):
        return None
    return Later(x.clone() if keep_copy else x, precision, thin=thin)  # the copy keeps the values that x has now


def starts_slowly(x: Tensor, thin: bool = False) -> bool:
    """Tell whether launching the work on features `(n, d)` takes longer than doing it, if there are not too many.

    That holds off the CPU, where work is only launched, and where there is little work.

    Args:
        x: features.
        thin: whether the work is on the features alone, without a Gram matrix.
    """
    return x.device.type != "cpu" or 4 * (x.numel() if thin else len(x) * max(x.shape)) <= SMALL_ON_CPU


def complete(kernels: Mapping[str, Kernel]) -> dict[str, Tensor]:
    """Compute all layers that are to be computed later, each kind in a few large operations.

    Args:
        kernels: Gram matrices, `Thin` features and layers to compute later, by layer.

    Returns:
        Gram matrices or `Thin` features, in the same order.
    """
    kinds: dict[tuple[Any, ...], dict[str, Later]] = {}
    for name, kernel in kernels.items():
        if isinstance(kernel, Later):
            kinds.setdefault(kernel.kind, {})[name] = kernel
    made: dict[str, Tensor] = {}
    for layers in kinds.values():
        names, first = list(layers), next(iter(layers.values()))
        most = max(1, MOST // max(1, first.size))
        for start in range(0, len(names), most):
            group = names[start : start + most]
            values = [layers[name].values for name in group]
            if first.multiplied:
                together = scaled_product(torch.stack(values), first.precision)[0].unbind()
            elif first.thin:
                together = Thin.apply(first.precision, *values)
            else:
                together = CentredKernels.apply(first.precision, *values).unbind()
            made |= dict(zip(group, together, strict=True))
    return {name: made[name] if isinstance(kernel, Later) else kernel for name, kernel in kernels.items()}


class KernelsContext(Context):
    """The context of a `CentredKernels`."""

    factor: Tensor


class CentredKernels(torch.autograd.Function):
    """Several `grams.CentredKernel` of layers of one shape: `(layers, n, n)`."""

    @staticmethod
    def forward(ctx: KernelsContext, precision: torch.dtype, *features: Tensor) -> Tensor:
        x = torch.stack(features)
        x = x if for_tensor_cores(x) or x.dtype == torch.float64 else x.float()
        if for_tensor_cores(x):
            kernels, ctx.factor = scaled_product(half_precision.outer(x), half_precision.precision_of(x))
        else:
            kernels, ctx.factor, x = scaled_kernels(x, precision)
        ctx.save_for_backward(x)
        return kernels

    @staticmethod
    @without_second_derivative
    def backward(ctx: KernelsContext, gradient: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        gradient = center_in_place(gradient + gradient.mT).mul_(ctx.factor[:, None, None])
        if x.dtype in half_precision.HALF:
            return None, *half_precision.times(gradient, x).unbind()
        with exact_float32(x.device):
            return None, *(gradient @ x).unbind()


class ZerosWithSlopes(torch.autograd.Function):
    """Several `pair_loss.ZeroWithSlope`: zero with a given gradient in each of several matrices, `(layers, n, n)`."""

    @staticmethod
    def forward(ctx: Context, slopes: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        return slopes.new_zeros(())

    @staticmethod
    @without_second_derivative
    def backward(ctx: Context, gradient: Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        return None, *(slopes * gradient).unbind()
