"""The similarities of all pairs from their Gram matrices, and the loss with its gradient in the target's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_guidance.kernels import exact_float32, expect_centred, inverse_norm
from hf_guidance.mapping import Pair, pair_name
from hf_guidance.similarity import Measure

Grams = dict[str, Tensor]
Slope = tuple[Tensor, Tensor]  # a matrix, and the number it is multiplied by


def guidance_loss(
    pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams, *, mean: bool = False, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ or mean over the pairs of (1 − similarity), and the similarity of each pair, detached.

    The gradient in each target layer's Gram matrix is taken at once, so that until the backward nothing of what the
    measure computed is kept but that gradient; the loss has no second derivative for it.

    Args:
        pairs: all count; those that share a layer share its work.
        measure: what is compared.
        targets: Gram matrices ``(n, n)`` by layer, with their graphs.
        guides: the guide's, over the same samples.
        mean: over the pairs, instead of their sum.
        scale: factor of the gradient alone.
    """
    values: dict[str, Tensor] = {}
    slopes = []
    guide_sides = _guide_sides(pairs, measure, targets, guides)
    count = len(pairs) if mean else 1
    with exact_float32(next(iter(targets.values())).device):
        for layer, kernel in targets.items():
            own = [guide for target, guide in pairs if target == layer]
            with_slope = kernel.requires_grad and torch.is_grad_enabled()
            found, slope = _of_one_layer(measure, kernel.detach(), [guide_sides[g] for g in own], with_slope)
            values |= {pair_name((layer, g)): value for g, value in zip(own, found, strict=True)}
            if slope is not None:
                if measure.centred_slope:
                    expect_centred(kernel)
                slopes.append(ZeroWithSlope.apply(kernel, *slope))
        values = {pair_name(pair): values[pair_name(pair)] for pair in pairs}
        loss = (1 - torch.stack(list(values.values()))).sum() / count
    return loss + torch.stack(slopes).sum() * (-scale / count) if slopes else loss, values


class ZeroWithSlope(torch.autograd.Function):
    """0, whose gradient in a matrix is a factor times the given one: the matrix need not be kept for the backward."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, slope: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(slope, factor)
        return matrix.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        slope, factor = ctx.saved_tensors
        return slope * (gradient * factor), None, None


def _of_one_layer(
    measure: Measure, kernel: Tensor, guide_sides: Sequence[Any], with_slope: bool
) -> tuple[Sequence[Tensor], Slope | None]:
    """Its similarities, and the gradient of their sum in its Gram matrix."""
    with torch.set_grad_enabled(with_slope):
        leaf = kernel.requires_grad_(with_slope)
        if measure.kernel is not None:
            own = measure.kernel(leaf)
            values, slope = cosines(own.detach(), guide_sides, with_slope)
            if slope is not None and own is not leaf:
                slope = torch.autograd.grad(own, leaf, slope[0])[0], slope[1]
            return values, slope
        side = measure.target_side(leaf)
        found = [measure.compare(side, guide_side) for guide_side in guide_sides]
        if not with_slope or not found:
            return found, None
        (gradient,) = torch.autograd.grad(torch.stack(found).sum(), leaf)
        return [value.detach() for value in found], (gradient, gradient.new_ones(()))


@torch.no_grad()
def cosines(kernel: Tensor, units: Sequence[Tensor], with_slope: bool = True) -> tuple[list[Tensor], Slope | None]:
    """Cosines ``⟨K, L̂⟩ / ‖K‖`` of a kernel with others of norm 1; ``Σ (L̂ − cosine K̂)`` and ``1 / ‖K‖``, their slope."""
    inverse = inverse_norm(kernel)
    values = [torch.dot(kernel.flatten(), other.flatten()) * inverse for other in units]
    if not with_slope or not units:
        return values, None
    total = units[0] if len(units) == 1 else torch.stack(list(units)).sum(0)
    return values, (total.addcmul(kernel, sum(values) * inverse, value=-1), inverse)


@torch.no_grad()
def similarities(pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams) -> dict[str, Tensor]:
    """The similarity of each pair, without a gradient."""
    return guidance_loss(pairs, measure, targets, guides)[1]


@torch.no_grad()
def _guide_sides(pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams) -> dict[str, Any]:
    like = next(iter(targets.values()))
    with exact_float32(like.device):
        return {g: measure.guide_side(guides[g].to(like)) for g in dict.fromkeys(g for _, g in pairs)}
