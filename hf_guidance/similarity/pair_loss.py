"""The similarities of all pairs from their Gram matrices, and the loss with its gradient in the target's."""

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
Slope = tuple[Tensor, Tensor | None]  # a matrix, and the number it is multiplied by, unless it has been
Compared = tuple[
    Tensor, Mapping[str, Slope]
]  # similarity of each pair, and its sum's slope in each target's Gram matrix


def guidance_loss(
    pairs: Sequence[Pair], measure: Measure, targets: Grams, guides: Grams, *, mean: bool = False, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ or mean over the pairs of (1 − similarity), and the similarity of each pair, detached.

    The gradient in each target layer's Gram matrix is taken at once, so that until the backward nothing of what the
    measure computed is kept but that gradient; the loss has no second derivative for it.

    Args:
        pairs: all count; those that share a layer share its work.
        measure: what is compared.
        targets: Gram matrices ``(n, n)`` by layer, with their graphs, or `Thin` features in place of any; those of no
            pair are left aside. All are compared where the first one is.
        guides: the guide's, over the same samples.
        mean: over the pairs, instead of their sum.
        scale: factor of the gradient alone.
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
    """0, with a slope in each of these."""
    if any(factor is None for _, factor in slopes.values()):
        return ZerosWithSlopes.apply(torch.stack([s for s, _ in slopes.values()]), *(targets[name] for name in slopes))
    return torch.stack([ZeroWithSlope.apply(targets[name], *slope) for name, slope in slopes.items()]).sum()


class ZeroWithSlope(torch.autograd.Function):
    """0, whose gradient in a matrix is a factor times the given one: the matrix need not be kept for the backward."""

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
    """Any measure: what the pairs of a layer share is computed once, and the slope is autograd's."""
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
    """A measure that is the cosine of two kernels, with the slope in closed form as far as the kernel."""
    assert measure.kernel is not None
    with torch.no_grad():
        others = {name: measure.kernel(kernel) for name, kernel in guides.items()}
    if measure.centred_slope:  # the kernel is the Gram matrix
        first = next(iter(targets.values()))
        alike = all(kernel.shape == first.shape for kernel in targets.values())  # not of layers with other positions
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
    """The start of a graph of its own, which ends with the block; without one where no gradient is wanted."""
    wanted = kernel.requires_grad and torch.is_grad_enabled()
    with torch.set_grad_enabled(wanted):
        yield kernel.detach().requires_grad_(wanted)


def _cosines(pairs: Sequence[Pair], kernels: Grams, others: Grams) -> Compared:
    """``⟨K, L⟩ / (‖K‖ ‖L‖)`` of each pair, and ``Σ (L / ‖L‖ − cosine · K / ‖K‖) / ‖K‖``, the slope in each K.

    Numbers are computed for all pairs at once: one by one, they would take as long as the matrices.
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
    """`_cosines` in a few large steps, where each takes long to start."""
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
    """The similarity of each pair, without a gradient."""
    return guidance_loss(pairs, measure, targets, guides)[1]
