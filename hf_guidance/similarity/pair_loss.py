"""Similarities of all pairs from their Gram matrices, and the loss with its gradient in the target's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_guidance.mapping import Pair, pair_name
from hf_guidance.similarity.grams import Context, exact_float32, expect_centred, without_second_derivative
from hf_guidance.similarity.matrices import dot, inverse_norms, inverse_of, norms
from hf_guidance.similarity.measures import Measure
from hf_guidance.similarity.narrow import cosines, is_thin, whole
from hf_guidance.similarity.representation import MOST, ZerosWithSlopes, starts_slowly

Grams = dict[str, Tensor]
Slope = tuple[Tensor, Tensor | None]  # a matrix and its factor; None if it is multiplied already
# similarity of each pair, and the slope of their sum in each target's Gram matrix
Compared = tuple[Tensor, Mapping[str, Slope]]


def guidance_loss(
    pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams, *, mean: bool = False, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the sum or mean over the pairs of (1 − similarity), and each pair's similarity.

    The gradient in each target layer's Gram matrix is computed at once. Until the backward only that gradient is kept,
    nothing else that the measure computed. The loss has no second derivative.

    Args:
        pairs: (target layer, guide layer). Each counts. Pairs with a common layer share its work.
        measure: similarity measure.
        targets: by layer, Gram matrices `(n, n)` with their graphs, or `Thin` features. Layers in no pair are ignored.
            All are compared on the device of the first one.
        guides: the same for the guide, over the same samples.
        mean: take the mean over the pairs instead of the sum.
        scale: factor of the gradient, not of the value.

    Returns:
        The loss, a scalar, and pair → similarity, detached.
    """
    like = next(iter(targets.values()))
    count = len(pairs) if mean else 1
    targets, guides = {t: targets[t].to(like) for t, _ in pairs}, {g: guides[g].to(like) for _, g in pairs}
    thin = measure.centred_slope and all(map(is_thin, (*targets.values(), *guides.values())))
    with exact_float32(like.device):
        slopes: Mapping[str, Slope]
        if thin:
            values, slopes = cosines(pairs, targets, guides)
        else:
            targets, guides = whole(targets), whole(guides)
            by = _one_by_one if measure.kernel is None else _by_cosines
            values, slopes = by(pairs, measure, targets, guides)
        loss = (1 - values).sum() / count
    if slopes:
        if measure.centred_slope:
            for layer in slopes:
                expect_centred(targets[layer])
        loss = loss + _zero(targets, slopes) * (-scale / count)
    return loss, dict(zip(map(pair_name, pairs), values.unbind(), strict=True))


def _zero(targets: Grams, slopes: Mapping[str, Slope]) -> Tensor:
    """Return 0, with a gradient of the given slope in each of the targets."""
    if any(factor is None for _, factor in slopes.values()):
        return ZerosWithSlopes.apply(torch.stack([s for s, _ in slopes.values()]), *(targets[name] for name in slopes))
    return torch.stack([ZeroWithSlope.apply(targets[name], *slope) for name, slope in slopes.items()]).sum()


class ZeroWithSlope(torch.autograd.Function):
    """Zero whose gradient in a matrix is a factor times a given slope. The backward need not keep the matrix."""

    @staticmethod
    def forward(ctx: Context, matrix: Tensor, slope: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(slope, factor)
        return matrix.new_zeros(())

    @staticmethod
    @without_second_derivative
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        slope, factor = ctx.saved_tensors
        return slope * (gradient * factor), None, None


def _one_by_one(pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams) -> Compared:
    """Compare pairs by any measure. Work per layer is done once, and autograd computes the slope."""
    with torch.no_grad():
        guide_sides = {name: measure.guide_side(kernel) for name, kernel in guides.items()}
    values: dict[Pair, Tensor] = {}
    slopes: dict[str, Slope] = {}
    for layer, kernel in targets.items():
        with _leaf(kernel) as leaf:
            side = measure.target_side(leaf)
            found = {pair: measure.compare(side, guide_sides[pair[1]]) for pair in pairs if pair[0] == layer}
            if leaf.requires_grad:
                (slope,) = torch.autograd.grad(torch.stack(list(found.values())).sum(), leaf)
                slopes[layer] = slope, slope.new_ones(())
        values |= {pair: value.detach() for pair, value in found.items()}
    return torch.stack([values[pair] for pair in pairs]), slopes


def _by_cosines(pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams) -> Compared:
    """Compare pairs by a cosine of two kernels, with the slope in the kernel in closed form."""
    assert measure.kernel is not None
    with torch.no_grad():
        others = {name: measure.kernel(kernel) for name, kernel in guides.items()}
    if measure.centred_slope:  # the kernel is the Gram matrix
        first = next(iter(targets.values()))
        # layers may differ in their number of positions
        alike = all(kernel.shape == first.shape for kernel in targets.values())
        together = alike and starts_slowly(first) and len(pairs) * first.nbytes <= MOST
        return (_cosines_together if together else _cosines)(pairs, targets, others)
    values: dict[Pair, Tensor] = {}
    slopes: dict[str, Slope] = {}
    for layer, kernel in targets.items():
        own = [pair for pair in pairs if pair[0] == layer]
        with _leaf(kernel) as leaf:
            made = measure.kernel(leaf)
            found, slope = _cosines(own, {layer: made}, {guide: others[guide] for _, guide in own})
            if layer in slope:
                slopes[layer] = torch.autograd.grad(made, leaf, slope[layer][0])[0], slope[layer][1]
        values |= dict(zip(own, found.unbind(), strict=True))
    return torch.stack([values[pair] for pair in pairs]), slopes


@contextmanager
def _leaf(kernel: Tensor) -> Iterator[Tensor]:
    """Open a graph that starts at the kernel and ends with the block; no graph if no gradient is needed."""
    wanted = kernel.requires_grad and torch.is_grad_enabled()
    with torch.set_grad_enabled(wanted):
        yield kernel.detach().requires_grad_(wanted)


def _cosines(pairs: Sequence[Pair], kernels: Grams, others: Grams) -> Compared:
    """Compute `⟨K, L⟩ / (‖K‖ ‖L‖)` of each pair, and the slope `Σ (L / ‖L‖ − cosine · K / ‖K‖) / ‖K‖` in each K.

    Scalars are computed for all pairs at once. One by one, they would take as long as the matrices.
    """
    with_slope = [layer for layer, kernel in kernels.items() if kernel.requires_grad and torch.is_grad_enabled()]
    with torch.no_grad():
        inverse = inverse_norms([*kernels.values(), *others.values()]).unbind()
        of_kernel = dict(zip(kernels, inverse, strict=False))
        of_other = dict(zip(others, inverse[len(kernels) :], strict=True))
        dots = torch.stack([dot(kernels[t], others[g]) for t, g in pairs])
        ours, theirs = torch.stack([of_kernel[t] for t, _ in pairs]), torch.stack([of_other[g] for _, g in pairs])
        cosines, shares = dots * ours * theirs, (dots * ours.square()).unbind()
        slopes: dict[str, Slope] = {}
        for layer in with_slope:
            own = [(guide, shares[i]) for i, (target, guide) in enumerate(pairs) if target == layer]
            if len(own) == 1:
                ((guide, share),) = own
                total, factor = others[guide], of_kernel[layer] * of_other[guide]
            else:
                total = sum((others[g] * of_other[g] for g, _ in own), torch.zeros_like(kernels[layer]))
                share, factor = torch.stack([of_other[g] * part for g, part in own]).sum(), of_kernel[layer]
            slopes[layer] = total.addcmul(kernels[layer], share, value=-1), factor
    return cosines, slopes


def _cosines_together(pairs: Sequence[Pair], kernels: Grams, others: Grams) -> Compared:
    """Do as `_cosines` in a few large operations, where each takes long to start."""
    with_slope = [layer for layer, kernel in kernels.items() if kernel.requires_grad and torch.is_grad_enabled()]
    with torch.no_grad():
        ours, theirs = torch.stack([kernels[t] for t, _ in pairs]), torch.stack([others[g] for _, g in pairs])
        of_ours, of_theirs = (inverse_of(norms(x), x.shape[1]) for x in (ours, theirs))
        dots = torch.linalg.vecdot(ours.flatten(1), theirs.flatten(1))
        cosines, factors = dots * of_ours * of_theirs, (of_ours * of_theirs)[:, None, None]
        slopes: dict[str, Slope] = {}
        if with_slope:
            parts = theirs.addcmul_(ours, (dots * of_ours.square())[:, None, None], value=-1).mul_(factors).unbind()
            for (target, _), part in zip(pairs, parts, strict=True):
                if target in with_slope:
                    slopes[target] = (slopes[target][0] + part if target in slopes else part), None
    return cosines, slopes


@torch.no_grad()
def similarities(pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams) -> dict[str, Tensor]:
    """Compute the similarity of each pair, without a gradient.

    Args:
        pairs: (target layer, guide layer).
        measure: similarity measure.
        targets: by layer, Gram matrices `(n, n)` or `Thin` features.
        guides: the same for the guide, over the same samples.

    Returns:
        Pair → similarity, a scalar.
    """
    return guidance_loss(pairs, measure, targets, guides)[1]
