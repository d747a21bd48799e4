"""A layer on a batch in the smaller of two forms: the one door between a network's features and the measures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from hf_guidance.similarity import half_precision
from hf_guidance.similarity.matrices import (
    center,
    center_in_place,
    centred_product,
    exact_float32,
    for_numpy,
    inner,
    outer,
    over_matrix,
)

PRIMAL_BELOW = 0.4  # largest d / n at which the 7 n d² operations of a pair are fewer than 3 n² d
SUM_ROUNDING = 2**-18  # relative rounding of a sum of products in float32; measurements stay below a fourth of it
Form: TypeAlias = Literal["primal", "dual"]


@dataclass(frozen=True, eq=False)
class Layer:
    """Samples of a layer on a batch, centred and scaled to a mean squared norm of 1; zero for a dead layer.

    A gradient in `values` must be centred, symmetric if dual, and orthogonal to the values: the backward relies on this
    and does not check it. `tangent` makes any slope so.

    Attributes:
        values: Features `(n, d)` if primal; Gram matrix `(n, n)` if dual, or those of both halves of a sketch, `(2, n,
            n)`. A further first axis is of batch rows, each of which is a layer by itself. They carry the graph of the
            layer's features.
        form: `primal` or `dual`.
        width: Number d of features.
        parts: 2 for a sketched layer, whose first and second half of features are independent sketches, scaled so that
            the Gram matrix is the mean of theirs; else 1.
        factor: By which squared features were multiplied, so that the mean squared norm of a sample is 1; 0 if dead.
    """

    values: Tensor
    form: Form
    width: int
    parts: int = 1
    factor: Tensor | float = 1.0

    @property
    def samples(self) -> int:
        """Return the number n of samples."""
        return self.values.shape[-2]

    @property
    def rows(self) -> int:
        """Return the number of batch rows that are layers by themselves; 1 if the samples are of all rows."""
        return len(self.values) if self.values.ndim > 2 and self.parts == 1 else 1

    def gram(self) -> Tensor:
        """Return the Gram matrix of a layer in either form: the mean over the parts, `(n, n)`."""
        if self.form == "primal":
            return outer(self.values)
        return self.values if self.parts == 1 else self.values.mean(0)

    def tangent(self, slope: Tensor) -> Tensor:
        """Project a slope, in place, onto the changes that the values can make.

        These are centred, symmetric if dual, and keep the scale.
        """
        along = inner(slope, self.values) / self.samples
        if self.form == "primal":
            return slope.sub_(slope.mean(-2, keepdim=True)).addcmul_(self.values, over_matrix(along), value=-1)
        slope = (slope + slope.mT) / 2
        along = along if self.parts == 1 else along.mean(0)
        slope.diagonal(dim1=-2, dim2=-1).sub_(along[..., None])
        return center_in_place(slope)

    def in_dual_form(self) -> Layer:
        """Return a layer of one part as its Gram matrix, without a graph."""
        return replace(self, values=self.gram().detach(), form="dual")

    def constant(self, like: Tensor) -> Layer:
        """Return the layer without its graph, on the device and in the dtype of another's values."""
        return replace(self, values=self.values.detach().to(like))


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
        ValueError: If the features have fewer than two axes, or do not match the mask.
    """
    values = layer_of(features, mask, primal_below=0).values
    if not values.requires_grad:
        return values
    return center((values + values.T) / 2)  # which makes any gradient symmetric and centred


def layer_of(
    features: Tensor,
    mask: Tensor | None = None,
    *,
    primal_below: float = PRIMAL_BELOW,
    sketch: Callable[[Tensor], Tensor] | None = None,
    parts: int = 1,
    precision: torch.dtype | None = None,
    copy: bool = False,
    in_region: bool = False,
    of_rows: bool = False,
) -> Layer:
    """Make a layer from its features: the only place that chooses between features and their Gram matrix.

    Args:
        features, mask: As of `gram`.
        primal_below: Largest d / n at which the layer stays features.
        sketch: Applied to the masked, centred features `(n, d)`. Without a mask, sketch the features before.
        parts: 2 if the features are already two halves of a sketch.
        precision: Dtype in which the features were computed, if it is not their present one.
        copy: Keep a copy for the backward, because the features may be overwritten in place before it.
        in_region: The features come from a network that runs now. Under autocast, features in float32 are then as
            coarse as the autocast dtype, so a GPU may multiply them on its tensor cores.
        of_rows: The features are `(rows, n, d)`: each row is a layer by itself.

    Raises:
        ValueError: If the features have fewer than two axes, or do not match the mask.
    """
    if features.ndim < 2 or (mask is not None and features.shape[:2] != mask.shape):
        expected = "(n, d)" if mask is None else f"({mask.shape[0]}, {mask.shape[1]}, …) to match the mask"
        raise ValueError(f"features have shape {tuple(features.shape)}; expected {expected}.")
    if not features.is_floating_point():
        features = features.float()
    precision, rounding = precision or features.dtype, None
    if mask is None:
        x = features if of_rows else flat(features)
    else:
        with exact_float32(features.device):
            x, parts, rounding = masked(_float(features), mask.bool(), precision, sketch)
    form: Form = "primal" if x.shape[-1] <= primal_below * x.shape[-2] else "dual"
    with_cores = form == "dual" and mask is None and x.is_cuda and half_precision.for_tensor_cores(x, in_region)
    if not with_cores:
        x = _float(x)
    elif x.dtype not in half_precision.HALF:
        precision = torch.get_autocast_dtype(x.device.type)
    wanted = x.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        if form == "primal":
            made = primal(x.detach(), precision, rounding)
        elif with_cores:
            made = from_product(half_precision.outer(halves_of(x.detach(), parts)), precision, parts)
        else:
            made = dual(x.detach(), parts, precision, rounding, wanted)
    if wanted:
        made = made._replace(values=_Values.apply(x, made, form, parts, copy and x.data_ptr() == features.data_ptr()))
    return Layer(made.values, form, x.shape[-1], parts, made.factor)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def flat(x: Tensor) -> Tensor:
    """Flatten `(n, …)` to `(n, d)`. The features keep their order in memory, so that nothing is copied."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


# -------------------------------------------------------------------------------------------------------- the two forms


class Made(NamedTuple):
    """Values of a layer, and what its backward needs.

    Args:
        values: See `Layer`.
        factor: By which the squared features were multiplied, a number or `(…, 1, 1)`; 0 for a dead layer.
        mean: Mean of the features if a dual backward must subtract it.
    """

    values: Tensor
    factor: Tensor | float
    mean: Tensor | None = None


def halves_of(x: Tensor, parts: int) -> Tensor:
    """Split features `(n, d)` into `(parts, n, d / parts)`; as they are if there is one part."""
    return x if parts == 1 else x.unflatten(1, (parts, -1)).transpose(0, 1)


def primal(x: Tensor, precision: torch.dtype, rounding: Tensor | None = None) -> Made:
    """Centre and scale features.

    Args:
        x: Features `(…, n, d)`.
        precision: Dtype in which they were computed.
        rounding: Energy of the rounding, if a mean was subtracted before.
    """
    mean = x.mean(-2, keepdim=True)
    centred = x - mean
    centred -= centred.mean(-2, keepdim=True)  # removes the rounding of the mean
    factor = _factor(centred, mean, precision, rounding)
    return Made(centred.mul_(factor.sqrt()), factor)


def dual(
    x: Tensor, parts: int, precision: torch.dtype, rounding: Tensor | None = None, with_gradient: bool = False
) -> Made:
    """Compute the Gram matrix of centred, scaled features.

    Args:
        x, precision, rounding: As of `primal`.
        parts: Number of parts of the features, each with a Gram matrix of its own.
        with_gradient: Whether a backward will multiply the features.
    """
    plain = x.dtype == torch.float32 and x.ndim == 2 and parts == 1 and rounding is None and for_numpy(x)
    if plain and (found := centred_product(x, with_gradient)):
        gram, energy, mean = found
        if mean is None or not _may_be_dead(energy, mean, precision):
            return Made(gram.mul_(1 / energy), 1 / energy, mean)
    mean = x.mean(-2, keepdim=True)
    centred = x - mean
    factor = _factor(centred, mean, precision, rounding)
    with exact_float32(x.device):
        gram = center_in_place(outer(halves_of(centred, parts)))  # again, to remove the rounding of the mean
    return Made(gram.mul_(parts * factor), factor, mean)


def from_product(gram: Tensor, precision: torch.dtype, parts: int = 1) -> Made:
    """Centre and scale the products `x xᵀ` of features that still have their mean, `(…, n, n)`.

    They are zero where the spread is within the rounding of the mean or of the sum of products.
    """
    over = (-3, -2, -1) if parts > 1 else (-2, -1)
    # constant features included, so that more layers count as dead than in `_factor`
    offset = gram.mean(over, keepdim=True) * parts
    diagonal = center_in_place(gram).diagonal(dim1=-2, dim2=-1)[..., None]
    energy = diagonal.mean(over, keepdim=True) * parts
    factor = _inverse(energy, max(_rounding(precision), SUM_ROUNDING) * offset)
    return Made(gram.mul_(parts * factor), factor)


def _factor(centred: Tensor, mean: Tensor, precision: torch.dtype, rounding: Tensor | None) -> Tensor:
    """Compute one over the energy of layers, `(…, 1, 1)`; 0 for a dead one, half of whose energy or more is rounding.

    Args:
        centred: Features minus their mean, `(…, n, d)`.
        mean: Mean of each feature, `(…, 1, d)`, whose rounding is judged feature by feature.
        precision: Dtype in which the features were computed.
        rounding: Energy of the rounding, if a mean was subtracted before.
    """
    spread = centred.square().mean(-2, keepdim=True)
    if rounding is None:
        rounding = torch.minimum(spread, _rounding(precision) * mean.square()).sum(-1, keepdim=True)
    return _inverse(spread.sum(-1, keepdim=True), 2 * rounding)


def _inverse(energy: Tensor, least: Tensor) -> Tensor:
    """Compute one over the energy; 0 up to the given least, NaN for infinity, so that it is noticed.

    A layer is dead as well if its energy is too small to be squared (activations below about 1e-20 in float32).
    """
    energy = energy.masked_fill(energy == torch.inf, torch.nan)
    return energy.reciprocal().masked_fill(energy <= least.clamp(min=torch.finfo(energy.dtype).tiny), 0)


def _rounding(precision: torch.dtype) -> float:
    """Return the most that rounding can make of the variance of a feature, relative to its squared mean.

    A network in float32 adds up several roundings. One in 16 bits computes in float32 and rounds the result once.
    """
    epsilon = torch.finfo(precision).eps
    return epsilon**2 / 2 if torch.finfo(precision).bits < 32 else 4 * epsilon**2


def _may_be_dead(energy: float, mean: Tensor, precision: torch.dtype) -> bool:
    return 2 * _rounding(precision) * float(mean.square().sum()) >= energy


def masked(
    x: Tensor, valid: Tensor, precision: torch.dtype, sketch: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, int, Tensor]:
    """Compute features whose products are those of the valid entries, their parts, and the energy of their rounding.

    Independent samples have products below 0 on average at each position, because they share their mean. One more
    feature for each position makes up for that.
    """
    x = x.reshape(*valid.shape, -1)
    m = valid.sum(0).to(x)  # (length,)
    mean = torch.where(valid[..., None], x, 0).sum(0) / m.clamp(min=1)[:, None]
    centred = torch.where(valid[..., None], x - mean, 0)
    spread = centred.square().sum(0)  # (length, d), times m
    with torch.no_grad():
        rounding = torch.minimum(spread, _rounding(precision) * mean.square() * m[:, None]).sum() / len(x)
    lost = spread.sum(1) / (m * (m - 1)).clamp(min=1)
    root = torch.where(lost > 0, lost, 1).sqrt() * (lost > 0)  # the slope of a root at 0 is infinite
    features = centred.flatten(1)
    sketched = features if sketch is None else sketch(features)
    parts = 1 if sketched is features else 2
    given_back = ((valid.to(x) - m / len(x)) * root / parts**0.5)[:, None].expand(-1, parts, -1)
    return torch.cat([sketched.unflatten(1, (parts, -1)), given_back], 2).flatten(1), parts, rounding


# ------------------------------------------------------------------------------------------------------ the gradient


class Context(FunctionCtx):
    """The context of a Function, with what torch's own type leaves out."""

    saved_tensors: tuple[Tensor, ...]


class ValuesContext(Context):
    """The context of a `_Values`."""

    form: Form
    parts: int
    factor: Tensor | float
    version: int


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


class _Values(torch.autograd.Function):
    """Values of a layer as a function of its features `(n, d)`, whose gradient is one product or none."""

    @staticmethod
    def forward(ctx: ValuesContext, x: Tensor, made: Made, form: Form, parts: int, copy: bool) -> Tensor:
        ctx.form, ctx.parts, ctx.factor = form, parts, made.factor
        if form == "dual":
            kept = x.clone() if copy else x
            ctx.version = kept._version
            ctx.save_for_backward(kept, *([] if made.mean is None else [made.mean]))
        return made.values.detach()  # an input that is also the output stops the compiler of torch 2.9

    @staticmethod
    @without_second_derivative
    def backward(ctx: ValuesContext, gradient: Tensor) -> tuple[Any, ...]:
        if ctx.form == "primal":
            return gradient * ctx.factor**0.5, None, None, None, None
        x, *mean = ctx.saved_tensors
        if x._version != ctx.version:  # torch itself does not see it where saved tensors have hooks
            raise RuntimeError(
                "features of a compared layer were overwritten in place before the backward, so that their gradient "
                "would be wrong: clone the outputs of the target before you change them."
            )
        gradient = center_in_place(gradient * (2 * ctx.parts * ctx.factor))  # its rounding, which the mean amplifies
        with exact_float32(x.device):
            halves = halves_of(x - mean[0] if mean else x, ctx.parts)
            product = half_precision.times(gradient, halves) if x.dtype in half_precision.HALF else gradient @ halves
        return (product if ctx.parts == 1 else product.transpose(0, 1).flatten(1)), None, None, None, None
