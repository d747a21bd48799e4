"""Gram matrices of a layer's n samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from hf_guidance.similarity import half_precision
from hf_guidance.similarity.half_precision import for_tensor_cores
from hf_guidance.similarity.matrices import center, center_in_place
from hf_guidance.similarity.numpy_products import features_on_cpu, for_numpy, kernel_on_cpu, outer

SUM_ROUNDING = 2**-18  # relative rounding of a sum of products in float32; measurements stay below a fourth of it
EXPECTED = "gradient_is_centred"


class Context(FunctionCtx):
    """The context of a Function, with what torch's own type leaves out."""

    saved_tensors: tuple[Tensor, ...]


class KernelContext(Context):
    """The context of a `CentredKernel`."""

    factor: float | Tensor
    has_mean: bool


def without_second_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the `backward` of a Function raise RuntimeError when a second derivative is asked for, which would be wrong.

    torch's `once_differentiable` is not enough: it checks only the gradient, not the saved features.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: similarities and guidance losses have no second derivative. Take it of the task "
                "loss alone, or write the similarity in plain torch."
            )
        return backward(ctx, *gradients)

    return checked


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast and TF32 off. A Gram matrix rounded to 8 or 10 bits gives another similarity."""
    return half_precision.float32_products("ieee", device)


def gram(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the Gram matrix of the centred features, scaled to a mean diagonal of 1; zero for a dead layer.

    Args:
        features: `(n, …)`. All axes after the first are flattened into one feature axis.
        mask: `(n, length)`, true at valid positions, for features `(n, length, …)`. Each column's mean is taken over
            its valid entries, and its invalid entries are set to that mean. Such a mean lowers the product of two
            samples on average. That amount is added back, so that padding carries no signal.

    Returns:
        `(n, n)` in float32, or float64 for float64 features. The gradient treats the scale as a constant. That is exact
        for every measure here, because none depends on the scale.

    Raises:
        ValueError: the features have fewer than two axes, or do not match the mask.
    """
    return layer_gram(features, mask)


def layer_gram(
    features: Tensor,
    mask: Tensor | None = None,
    *,
    sketch: Callable[[Tensor], Tensor] | None = None,
    precision: torch.dtype | None = None,
    keep_copy: bool = False,
    in_region: bool = False,
) -> Tensor:
    """Compute `gram` of a layer while its network runs.

    Args:
        features, mask: as of `gram`.
        sketch: function applied to the masked, centred features `(n, d)`. Without a mask, sketch the features before.
        precision: dtype in which the features were computed, if it is not their present one.
        keep_copy: keep a copy for the backward, because the features may be overwritten in place before it.
        in_region: the features come from a network that runs now. Under autocast, features in float32 are then as
            coarse as the autocast dtype, so a GPU may multiply them on its tensor cores.
    """
    if features.ndim < 2 or (mask is not None and features.shape[:2] != mask.shape):
        expected = "(n, d)" if mask is None else f"({mask.shape[0]}, {mask.shape[1]}, …) to match the mask"
        raise ValueError(f"gram: features have shape {tuple(features.shape)}, expected {expected}.")
    precision = precision or features.dtype
    as_it_is = features.dtype == torch.float64 or (mask is None and for_tensor_cores(features, in_region))
    x = features if as_it_is else features.float()
    if mask is None:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return _scaled_kernel(flat(x.detach()), precision, in_region)[0]
        return CentredKernel.apply(flat(x), precision, in_region, keep_copy and x is features)
    with exact_float32(features.device):
        kernel, offset = _masked_kernel(x, mask.bool(), precision, sketch or (lambda centred: centred))
        kernel = center(kernel)  # also removes the rounding of the mean
        return kernel / _scale(kernel.diagonal().mean().detach(), offset.detach(), precision)


def _scale(energy: Tensor, offset: Tensor, precision: torch.dtype) -> Tensor:
    """Compute the mean diagonal, by which a Gram matrix is divided; infinite for a dead layer."""
    energy, dead = _judged(energy, (2 * torch.finfo(precision).eps) ** 2 * offset)
    return energy.masked_fill(dead, torch.inf)


def _judged(energy: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's energy, and whether the layer is dead.

    An infinite energy becomes NaN, so that it is noticed. A layer is dead if its energy is within rounding, or too
    small to be squared (activations below about 1e-20 in float32).
    """
    energy = energy.masked_fill(energy == torch.inf, torch.nan)
    return energy, energy <= rounding.clamp(min=torch.finfo(energy.dtype).tiny)


def flat(x: Tensor) -> Tensor:
    """Flatten `(n, …)` to `(n, d)`. The features keep their order in memory, so that nothing is copied."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


class CentredKernel(torch.autograd.Function):
    """Gram matrix `x̃ x̃ᵀ / scale` of features `(n, d)` without a mask.

    The gradient is one product, `(G + Gᵀ) x̃`. Autograd would compute two, and differentiate the centring too. If `G`
    is centred, `x` can take the place of `x̃`. `expect_centred` promises a symmetric and centred `G`, and skips both
    steps.
    """

    @staticmethod
    def forward(ctx: KernelContext, x: Tensor, precision: torch.dtype, in_region: bool, keep_copy: bool) -> Tensor:
        kernel, ctx.factor, kept = _scaled_kernel(x, precision, in_region, keep=True)
        ctx.has_mean = kept is x
        ctx.save_for_backward(kept.clone() if keep_copy and kept is x else kept)
        return kernel

    @staticmethod
    @without_second_derivative
    def backward(ctx: KernelContext, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        if getattr(ctx, EXPECTED, False):
            factor = 2 * ctx.factor
            # remove its rounding, which the mean would amplify
            gradient = center(gradient) if ctx.has_mean else gradient
        else:
            gradient, factor = center_in_place(gradient + gradient.T), ctx.factor
        if x.dtype in half_precision.HALF:
            return half_precision.times(gradient * factor, x), None, None, None
        plain = for_numpy(x) and not torch.is_autocast_enabled("cpu")  # numpy needs no switch for autocast
        with nullcontext() if plain else exact_float32(x.device):
            if isinstance(factor, float):
                return torch.addmm(x.new_empty(()), gradient, x, beta=0, alpha=factor), None, None, None
            return (gradient * factor) @ x, None, None, None


def expect_centred(kernel: Tensor) -> None:
    """Promise that the gradient of `kernel` is already centred (and symmetric, for a result of `gram`).

    Its backward then skips these steps. A broken promise gives a wrong gradient without an error.

    Args:
        kernel: a result of `gram` or of `Thin`.
    """
    if isinstance(kernel.grad_fn, BackwardCFunction):
        setattr(kernel.grad_fn, EXPECTED, True)


def _scaled_kernel(
    x: Tensor, precision: torch.dtype, in_region: bool = False, keep: bool = False
) -> tuple[Tensor, float | Tensor, Tensor]:
    """Compute `x̃ x̃ᵀ / scale`; with `keep`, also its factor and the features for the backward."""
    if x.dtype == torch.float32 and for_numpy(x) and (found := kernel_on_cpu(x.numpy(), keep)):
        kernel, factor, kept = found
        return torch.from_numpy(kernel), factor, x if kept is None else torch.from_numpy(kept)
    if for_tensor_cores(x, in_region):
        return *scaled_product(half_precision.outer(x), half_precision.precision_of(x)), x
    return scaled_kernels(x, precision)


def scaled_kernels(x: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `x̃ x̃ᵀ / scale` as `_scaled_kernel` does, with torch alone, for `(n, d)` or `(layers, n, d)`."""
    with exact_float32(x.device):
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        kernel = center_in_place(outer(centred))  # again, to remove the rounding of the mean
        offset = _varying(mean, centred, precision).square().sum((-2, -1))
        inverse = _scale(_mean_diagonal(kernel), offset, precision).reciprocal()
        return kernel.mul_(inverse[..., None, None]), inverse, centred


def scaled_product(kernel: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Centre and scale in place the products `x xᵀ` of features that still have their mean.

    The result is zero where the spread is within the rounding of the mean or of the sum of products.

    Args:
        kernel: `(n, n)`, or `(layers, n, n)` for several layers.
        precision: dtype in which the features were computed.

    Returns:
        The Gram matrices, and the factor by which each was multiplied.
    """
    offset = kernel.mean((-2, -1))  # includes constant features, so more layers count as dead than in `_scale`
    energy = _mean_diagonal(center_in_place(kernel))
    energy, dead = _judged(energy, max(torch.finfo(precision).eps ** 2 / 2, SUM_ROUNDING) * offset)
    inverse = energy.reciprocal().masked_fill(dead, 0)
    return kernel.mul_(inverse[..., None, None]), inverse


def centred_features(x: Tensor, precision: torch.dtype) -> tuple[Tensor, Any]:
    """Centre features and scale them to a Gram matrix with mean diagonal 1.

    Args:
        x: `(n, d)`, or `(layers, n, d)` for several layers.
        precision: dtype in which the features were computed.

    Returns:
        The features, and the factor by which each layer was multiplied.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if x.ndim == 2 and x.dtype == torch.float32 and for_numpy(x) and (found := features_on_cpu(x.numpy())):
        return torch.from_numpy(found[0]), found[1]
    mean = x.mean(-2, keepdim=True)
    centred = x - mean
    centred -= centred.mean(-2, keepdim=True)  # remove the rounding of the mean
    offset = _varying(mean, centred, precision).square().sum((-2, -1))
    inverse = _scale(centred.square().sum((-2, -1)) / x.shape[-2], offset, precision).rsqrt()
    return centred * inverse[..., None, None], inverse


def _mean_diagonal(kernel: Tensor) -> Tensor:
    return kernel.diagonal(dim1=-2, dim2=-1).mean(-1)


def _varying(mean: Tensor, centred: Tensor, precision: torch.dtype, axis: int = -2) -> Tensor:
    """Return the mean, with 0 for constant features. Those have no rounding, which matters at 8 to 11 bits."""
    coarse = torch.finfo(precision).bits < 32
    return torch.where((centred != 0).any(axis, keepdim=True), mean, 0) if coarse else mean


def _masked_kernel(
    x: Tensor, valid: Tensor, precision: torch.dtype, sketch: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute the Gram matrix over the valid entries, and the energy of the means that were subtracted."""
    x = x.reshape(*valid.shape, -1)
    m = valid.sum(0).to(x)  # (length,)
    mean = torch.where(valid[..., None], x, 0).sum(0) / m.clamp(min=1)[:, None]
    centred = torch.where(valid[..., None], x - mean, 0)
    # independent samples have E⟨x̃_i, x̃_j⟩ = −E[spread] / (m (m − 1)) at each position, not 0: they share their mean
    lost = centred.square().sum((0, 2)) / (m * (m - 1)).clamp(min=1)
    flattened = sketch(centred.flatten(1))
    kernel = flattened @ flattened.T + (valid * lost) @ valid.to(x).T
    return kernel, (_varying(mean, centred, precision, axis=0).square().sum(-1) * m).sum() / len(x)
