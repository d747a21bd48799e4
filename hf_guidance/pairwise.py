"""The similarities of all pairs from their Gram matrices, and the loss with its gradient in the target's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_guidance.kernels import exact_float32
from hf_guidance.mapping import Pair, pair_name
from hf_guidance.similarity import Measure

Grams = dict[str, Tensor]


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
    parts = []
    guide_sides = _guide_sides(pairs, measure, targets, guides)
    with exact_float32(next(iter(targets.values())).device):
        for layer, kernel in targets.items():
            graph = kernel.requires_grad and torch.is_grad_enabled()
            leaf = kernel.detach().requires_grad_(graph)
            side = measure.target_side(leaf)
            own = {pair_name((t, g)): measure.compare(side, guide_sides[g]) for t, g in pairs if t == layer}
            values |= {name: value.detach() for name, value in own.items()}
            if graph and own:
                (slope,) = torch.autograd.grad(torch.stack(list(own.values())).sum(), leaf)
                parts.append((slope * kernel).sum())
        values = {pair_name(pair): values[pair_name(pair)] for pair in pairs}
        count = len(pairs) if mean else 1
        loss = (1 - torch.stack(list(values.values()))).sum() / count
        if parts:
            linear = torch.stack(parts).sum() * (-scale / count)
            loss = loss + (linear - linear.detach())
    return loss, values


@torch.no_grad()
def similarities(pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams) -> dict[str, Tensor]:
    """The similarity of each pair, without a gradient."""
    return guidance_loss(pairs, measure, targets, guides)[1]


@torch.no_grad()
def _guide_sides(pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams) -> dict[str, Any]:
    like = next(iter(targets.values()))
    with exact_float32(like.device):
        return {g: measure.guide_side(guides[g].to(like)) for g in dict.fromkeys(g for _, g in pairs)}
