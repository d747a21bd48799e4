"""Gram matrices, or `Thin` features, of many small layers at once: to start the work on one takes longer than to do it,
which on a GPU is so of most layers and on a CPU of very small or sketched ones."""

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

SMALL = 2**22  # bytes in float32 of a layer's features and of its Gram matrix, up to which both are kept for the others
SMALL_CONSTANT = 2**20  # the same where nothing but this would keep the features
SMALL_ON_CPU = 2**16  # the same on a CPU
SMALL_THIN = 2**20  # bytes of a Gram matrix, above which few features stand for it on a GPU, too
MOST = 2**27  # bytes that are copied, or made, together


@dataclass(frozen=True)
class Later:
    """What a layer's Gram matrix, or what stands for it, will be made of: its features ``(n, d)``, or if they are
    constants and many, their products ``(n, n)``.

    Args:
        precision: what the features were computed in.
        multiplied: whether these are products.
        thin: whether the features are to stand for the matrix.
    """

    values: Tensor
    precision: torch.dtype
    multiplied: bool = False
    thin: bool = False

    @property
    def size(self) -> int:
        """Bytes in float32 of the features or the Gram matrix, whichever are more; of thin ones there is no matrix."""
        return 4 * (self.values.numel() if self.thin else len(self.values) * max(self.values.shape))

    @property
    def kind(self) -> tuple[Any, ...]:
        """Alike for those that can be made together."""
        return self.multiplied, self.thin, self.precision, self.values.dtype, self.values.device, self.values.shape


Kernel = Tensor | Later


def later(x: Tensor, precision: torch.dtype, keep_copy: bool = False, thin: bool = False) -> Later | None:
    """What to keep of features ``(n, d)`` until the network that they are of has run; None if their Gram matrix, or
    what stands for it, is better made at once.

    Args:
        keep_copy: as of `kernels.gram`.
        thin: whether these few features could stand for their Gram matrix, which is larger.
    """
    n = len(x)
    thin = thin and not (4 * n * n <= SMALL_THIN and starts_slowly(x))
    copied_in_vain = thin and keep_copy and x.device.type == "cpu"  # as of one layer it takes no longer, without a copy
    if not starts_slowly(x, thin) or copied_in_vain:
        return None
    constant = not (x.requires_grad and torch.is_grad_enabled())
    if constant and not thin and for_tensor_cores(x, in_region=True):
        return Later(half_precision.outer(x.detach()), half_precision.precision_of(x), multiplied=True)
    if Later(x, precision, thin=thin).size > (SMALL_CONSTANT if constant else SMALL):
        return None
    return Later(x.clone() if keep_copy else x, precision, thin=thin)  # the copy's gradient is x's as it is now


def starts_slowly(x: Tensor, thin: bool = False) -> bool:
    """Whether it takes longer to start work on features ``(n, d)`` than to do it, if they are not too many: where it is
    only started from here, and where there is little of it.

    Args:
        thin: whether that work is on the features alone, and on no Gram matrix of them.
    """
    return x.device.type != "cpu" or 4 * (x.numel() if thin else len(x) * max(x.shape)) <= SMALL_ON_CPU


def complete(kernels: Mapping[str, Kernel]) -> dict[str, Tensor]:
    """All as Gram matrices, or what stands for them, in their order; those that are yet to be made, in few steps for
    each kind."""
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
    """`kernels.CentredKernel` of several layers of one shape: ``(layers, n, n)``."""

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
    """`pairwise.ZeroWithSlope` of several matrices: 0, whose gradients in them are given, ``(layers, n, n)``."""

    @staticmethod
    def forward(ctx: Context, slopes: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        return slopes.new_zeros(())

    @staticmethod
    @without_second_derivative
    def backward(ctx: Context, gradient: Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        return None, *(slopes * gradient).unbind()
