"""Similarities of all pairs of layers, and the guidance loss with its gradient in the target's layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hf_guidance.mapping import PAIR_SEPARATOR, Pair
from hf_guidance.similarity.layers import Context, Layer, without_second_derivative
from hf_guidance.similarity.matrices import exact_float32

Prepared = TypeVar("Prepared")  # a layer with the work on it that its pairs share
Layers = Mapping[str, Layer]
Groups = Mapping[str, Sequence[Layer]]  # name → a layer for each group of samples that are compared with each other


class Method(Protocol[Prepared]):
    """A similarity in two stages, so that pairs with a common layer share its work."""

    def prepare(self, layer: Layer, with_slope: bool) -> Prepared:
        """Do the work on one layer that its pairs share; `with_slope` for a target whose slope will be needed."""

    def compare(self, target: Prepared, guide: Prepared) -> tuple[Tensor, Tensor | None]:
        """Return the similarity of two prepared layers, and its slope in the target's values if that is needed."""


class Comparable(Protocol):
    """A method, and what has to be known of it to compare layers by it; see `Measure`."""

    @property
    def method(self) -> Method[Any]: ...
    @property
    def primal_below(self) -> float: ...
    @property
    def min_samples(self) -> int: ...


def guidance_loss(
    pairs: Sequence[Pair],
    measure: Comparable,
    targets: Layers,
    guides: Layers,
    *,
    weights: Sequence[float] | None = None,
    mean: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum or mean over the pairs of (1 − similarity), and each pair's similarity.

    Of layers of batch rows, which are compared by themselves, these are means over the rows.

    The slope of each target layer is computed at once. Until the backward only that slope is kept, nothing else that
    the measure computed. The loss has no second derivative.

    Args:
        pairs: (target layer, guide layer). Each counts. Pairs with a common layer share its work.
        measure: Similarity measure.
        targets: Layers of the target with their graphs, by name. Layers in no pair are ignored. All are compared on the
            device of the first one.
        guides: Layers of the guide, over the same samples.
        weights: Weight of each pair, not all 0; None weighs all pairs equally.
        mean: Divide the sum by the sum of the weights.
        scale: Factor of the gradient, not of the value.

    Returns:
        The loss, a scalar, and pair → similarity, detached and unweighted.
    """
    weights = weights if weights is not None and any(weight != 1 for weight in weights) else None
    values, slopes = compare_pairs(pairs, measure, targets, guides, weights)
    rows = values[0].numel()  # several if each batch row is compared by itself
    count = 1.0 if not mean else len(pairs) if weights is None else sum(weights)
    terms = 1 - values
    if weights is not None:  # one product each, as moving the weights to a GPU would wait for it
        terms = torch.stack([weight * term for weight, term in zip(weights, terms.unbind(), strict=True)])
    loss = with_slopes(terms.sum() / (count * rows), targets, slopes, -scale / (count * rows))
    return loss, dict(zip(map(PAIR_SEPARATOR.join, pairs), values.view(len(pairs), rows).mean(1).unbind(), strict=True))


def guidance_loss_of_groups(
    pairs: Sequence[Pair],
    measure: Comparable,
    targets: Groups,
    guides: Groups,
    *,
    weights: Sequence[float] | None = None,
    mean: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `guidance_loss` of layers in groups of samples: each pair's mean over groups, weighted by their rows.

    Args:
        pairs, measure, weights, mean, scale: As of `guidance_loss`.
        targets, guides: Layers by name, one for each group. Both layers of a pair have the same groups. Groups with
            fewer samples than the measure needs are left out; each layer has one that suffices.

    Returns:
        As `guidance_loss`.
    """
    groups = {pair: tuple((layer.rows, layer.samples) for layer in targets[pair[0]]) for pair in pairs}
    if all(len(sizes) == 1 for sizes in groups.values()):
        sides = ({name: layers[0] for name, layers in side.items()} for side in (targets, guides))
        return guidance_loss(pairs, measure, *sides, weights=weights, mean=mean, scale=scale)
    weight_of = dict(zip(pairs, weights or [1.0] * len(pairs), strict=True))
    count = sum(weight_of.values()) if mean else 1
    losses: list[Tensor] = []
    values: dict[str, Tensor] = {}
    for sizes in dict.fromkeys(groups.values()):
        alike = [pair for pair in pairs if groups[pair] == sizes]
        enough = {i: rows for i, (rows, samples) in enumerate(sizes) if samples >= measure.min_samples}
        for i, rows in enough.items():
            share = rows / sum(enough.values())
            ours, theirs = ({pair[k]: side[pair[k]][i] for pair in alike} for k, side in enumerate((targets, guides)))
            own = [weight_of[pair] for pair in alike]
            loss, found = guidance_loss(alike, measure, ours, theirs, weights=own, scale=scale)
            losses.append(loss * (share / count))
            values |= {name: values.get(name, 0) + share * value for name, value in found.items()}
    return torch.stack(losses).sum(), {name: values[name] for name in map(PAIR_SEPARATOR.join, pairs)}


@torch.no_grad()
def similarities(pairs: Sequence[Pair], measure: Comparable, targets: Layers, guides: Layers) -> dict[str, Tensor]:
    """Compute the similarity of each pair, without a gradient.

    Args:
        pairs, measure, targets, guides: As of `guidance_loss`.

    Returns:
        Pair → similarity, a scalar.
    """
    return guidance_loss(pairs, measure, targets, guides)[1]


def compare_pairs(
    pairs: Sequence[Pair],
    measure: Comparable,
    targets: Layers,
    guides: Layers,
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the similarity of each pair, and the slope of their weighted sum in the values of each target layer.

    Args:
        pairs, measure, targets, guides: As of `guidance_loss`.
        weights: Weight of each pair in the slopes; None for 1.

    Returns:
        The similarities, `(pairs,)` or `(pairs, rows)`, and target layer → slope, of those layers that need a gradient.
    """
    like, with_gradient = targets[pairs[0][0]].values, torch.is_grad_enabled()
    weight_of = {} if weights is None else dict(zip(pairs, weights, strict=True))
    values: dict[Pair, Tensor] = {}
    slopes: dict[str, Tensor] = {}
    with torch.no_grad(), exact_float32(like.device):
        guide_sides = {
            g: measure.method.prepare(_fitting(guides[g].constant(like), measure), False)
            for g in dict.fromkeys(g for _, g in pairs)
        }
        for t in dict.fromkeys(t for t, _ in pairs):
            wanted = with_gradient and targets[t].values.requires_grad
            layer = targets[t].constant(like)
            compared = _fitting(layer, measure)
            side = measure.method.prepare(compared, wanted)
            total: Tensor | None = None
            for pair in [pair for pair in pairs if pair[0] == t]:
                values[pair], slope = measure.method.compare(side, guide_sides[pair[1]])
                if slope is not None:
                    if (weight := weight_of.get(pair, 1)) != 1:
                        slope = weight * slope
                    total = slope if total is None else total + slope
            if total is not None and compared is not layer:
                total = 2 * total @ layer.values  # the slope in features, from that in their Gram matrix
            if total is not None:
                slopes[t] = total.to(targets[t].values)
    return torch.stack([values[pair] for pair in pairs]), slopes


def _fitting(layer: Layer, measure: Comparable) -> Layer:
    """Return a layer as its Gram matrix if it has more features than samples and the measure needs no features."""
    too_wide = layer.form == "primal" and layer.parts == 1 and layer.width > layer.samples
    return layer.in_dual_form() if too_wide and not math.isinf(measure.primal_below) else layer


def with_slopes(value: Tensor, layers: Layers, slopes: Mapping[str, Tensor], factor: float = 1.0) -> Tensor:
    """Give a value the gradient of `factor` times the given slopes in the values of layers.

    Args:
        value: The value, without a graph.
        layers: Layers with their graphs, by name.
        slopes: Layer → slope, in the shape of its values.
        factor: Factor of all slopes.
    """
    for name, slope in slopes.items():
        value = value + ZeroWithSlope.apply(layers[name].values, slope, factor).to(value.device)
    return value


class SlopeContext(Context):
    """The context of a `ZeroWithSlope`."""

    factor: float


class ZeroWithSlope(torch.autograd.Function):
    """Zero whose gradient in a matrix is a factor times a given slope. The backward need not keep the matrix."""

    @staticmethod
    def forward(ctx: SlopeContext, matrix: Tensor, slope: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(slope)
        return matrix.new_zeros(())

    @staticmethod
    @without_second_derivative
    def backward(ctx: SlopeContext, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * (gradient * ctx.factor), None, None
