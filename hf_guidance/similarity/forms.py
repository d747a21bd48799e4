"""Features to one of a layer's two forms: centred and scaled, with or without a mask; zero for a dead layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_guidance.similarity.matrices import center_in_place, centred_product, exact_float32, for_numpy, outer

SUM_ROUNDING = 2**-18  # relative rounding of a sum of products in float32; measurements stay below a fourth of it


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


def primal(x: Tensor, precision: torch.dtype, noise: Tensor | None = None) -> Made:
    """Centre and scale features.

    Args:
        x: Features `(…, n, d)`.
        precision: Dtype in which they were computed.
        noise: Energy of the rounding, if a mean was subtracted before.
    """
    mean = x.mean(-2, keepdim=True)
    centred = x - mean
    centred -= centred.mean(-2, keepdim=True)  # removes the rounding of the mean
    factor = _factor(centred, mean, precision, noise)
    return Made(centred.mul_(factor.sqrt()), factor)


def dual(
    x: Tensor, parts: int, precision: torch.dtype, noise: Tensor | None = None, with_gradient: bool = False
) -> Made:
    """Compute the Gram matrix of centred, scaled features.

    Args:
        x, precision, noise: As of `primal`.
        parts: Number of parts of the features, each with a Gram matrix of its own.
        with_gradient: Whether a backward will multiply the features.
    """
    plain = x.dtype == torch.float32 and x.ndim == 2 and parts == 1 and noise is None and for_numpy(x)
    if plain and (found := centred_product(x, with_gradient)):
        gram, energy, mean = found
        if mean is None or not _may_be_dead(energy, mean, precision):
            return Made(gram.mul_(1 / energy), 1 / energy, mean)
    mean = x.mean(-2, keepdim=True)
    centred = x - mean
    factor = _factor(centred, mean, precision, noise)
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


def _factor(centred: Tensor, mean: Tensor, precision: torch.dtype, noise: Tensor | None) -> Tensor:
    """Compute one over the energy of layers, `(…, 1, 1)`; 0 for a dead one, half of whose energy or more is rounding.

    Args:
        centred: Features minus their mean, `(…, n, d)`.
        mean: Mean of each feature, `(…, 1, d)`, whose rounding is judged feature by feature.
        precision: Dtype in which the features were computed.
        noise: Energy of the rounding, if a mean was subtracted before.
    """
    spread = centred.square().mean(-2, keepdim=True)
    if noise is None:
        noise = torch.minimum(spread, _rounding(precision) * mean.square()).sum(-1, keepdim=True)
    return _inverse(spread.sum(-1, keepdim=True), 2 * noise)


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
        noise = torch.minimum(spread, _rounding(precision) * mean.square() * m[:, None]).sum() / len(x)
    lost = spread.sum(1) / (m * (m - 1)).clamp(min=1)
    root = torch.where(lost > 0, lost, 1).sqrt() * (lost > 0)  # the slope of a root at 0 is infinite
    features = centred.flatten(1)
    sketched = features if sketch is None else sketch(features)
    parts = 1 if sketched is features else 2
    given_back = ((valid.to(x) - m / len(x)) * root / parts**0.5)[:, None].expand(-1, parts, -1)
    return torch.cat([sketched.unflatten(1, (parts, -1)), given_back], 2).flatten(1), parts, noise
