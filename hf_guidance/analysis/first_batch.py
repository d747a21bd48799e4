"""A look at the first guided batch: its layers and pairs as plain data, and as the short text that is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_guidance.mapping import parse_pair
from hf_guidance.similarity.layers import Form, Layer
from hf_guidance.similarity.matrices import TINY
from hf_guidance.similarity.pair_loss import Groups, guidance_loss_of_groups
from hf_guidance.similarity.registry import get_measure

DEBIASED = "debiased_cka"
TOP = 0.02  # share of the samples that may hold most of a layer's energy
FEWEST = 50  # samples, below which this share is less than one
COPY = 1e-5  # squared distance of two samples over their squared norms, below which they are the same
MAX_ROWS = 12  # pairs in the printed table


@dataclass(frozen=True)
class LayerLook:
    """A layer on the first batch.

    Attributes:
        rows: Number of batch rows that are compared by themselves; 1 if the samples are of all rows.
        samples: Number of samples that are compared; the largest number of a row on the axis `within`.
        features: Number of features of a sample. A mask adds one for each position.
        form: `primal` if the layer is compared as features, `dual` if as a Gram matrix.
        is_dead: Whether its samples are equal up to rounding, so that its similarities are 0.
        top_share: Share of the energy, tr K, in the 2 % of the samples that hold most of it. None below 50 samples.
        repeated: Share of the energy in samples that occur more than once.
    """

    rows: int
    samples: int
    features: int
    form: Form
    is_dead: bool
    top_share: float | None
    repeated: float = 0.0


@dataclass(frozen=True)
class PairLook:
    """A pair of layers on the first batch.

    Attributes:
        target: Name of the target's layer.
        guide: Name of the guide's layer.
        similarity: Similarity by the measure trained on.
        debiased_cka: Similarity by debiased CKA. None below 4 samples.
    """

    target: str
    guide: str
    similarity: float
    debiased_cka: float | None


@dataclass
class FirstLook:
    """The state of guidance on the first batch, before the first optimizer step.

    Attributes:
        measure, sample_axis, weight, reduction: Settings in use; the weight is the full one, without a warm-up.
        pairs: The pairs that were compared.
        targets: Target layer → its look.
        guides: Guide layer → its look.
        gradient_ratio: Norm of guidance's gradient, at its full weight, over that of the task's, in the weights of the
            target that guidance reaches.
        not_measured: Why there is no such ratio; empty if there is one.
        uses_item_count: Whether the task loss depends on the number of items that Trainer passes to the target. None if
            that does not matter or is not known.
        warnings: Whatever is likely to spoil the run, each with a remedy.
    """

    measure: str
    sample_axis: str
    weight: float
    reduction: str
    pairs: list[PairLook]
    targets: dict[str, LayerLook]
    guides: dict[str, LayerLook]
    gradient_ratio: float | None = None
    not_measured: str = ""
    uses_item_count: bool | None = None
    warnings: list[str] = field(default_factory=list)


# -------------------------------------------------------------------------------------------------------- layers


def look_at_pairs(
    found: Mapping[str, Mapping[str, Tensor]], measure: str, targets: Groups, guides: Groups
) -> list[PairLook]:
    """Collect the similarities of the pairs, with debiased CKA beside them.

    Args:
        found: Measure → pair → similarity, as a watched forward computed them.
        measure: The measure trained on.
        targets: Layers of the target by name.
        guides: Layers of the guide by name.
    """
    pairs = [parse_pair(name) for name in found[measure]]
    debiased, other = found.get(DEBIASED), get_measure(DEBIASED)
    fewest = min(max(layer.samples for layer in targets[target]) for target, _ in pairs)
    if debiased is None and fewest >= other.min_samples:
        with torch.no_grad():
            debiased = guidance_loss_of_groups(pairs, other, targets, guides)[1]
    values = map(float, found[measure].values())
    beside = map(float, debiased.values()) if debiased else [None] * len(pairs)
    return [PairLook(*pair, value, other) for pair, value, other in zip(pairs, values, beside, strict=True)]


@torch.no_grad()
def look_at_layer(groups: Sequence[Layer]) -> LayerLook:
    """Describe a layer on a batch, given for each group of samples."""
    largest = max(groups, key=lambda layer: layer.samples)
    shares = torch.cat([_top_shares(layer) for layer in groups if layer.samples >= FEWEST] or [torch.empty(0)])
    return LayerLook(
        sum(layer.rows for layer in groups),
        largest.samples,
        largest.width,
        largest.form,
        not any(bool(layer.values.any()) for layer in groups),
        float(shares.mean()) if len(shares) else None,
        float(torch.cat([_repeated_shares(layer) for layer in groups]).mean()),
    )


def _energy(layer: Layer) -> Tensor:
    """Compute the squared norm of each sample, `(…, n)`."""
    if layer.form == "primal":
        return layer.values.square().sum(-1)
    energy = layer.values.diagonal(dim1=-2, dim2=-1)
    return energy if layer.parts == 1 else energy.mean(0)


def _top_shares(layer: Layer) -> Tensor:
    """Compute the share of the energy in the samples that hold most of it, for each row that is compared by itself."""
    energy = _energy(layer)
    top = energy.topk(int(TOP * layer.samples)).values.sum(-1)
    return (top / energy.sum(-1).clamp(min=TINY)).reshape(-1)


def _repeated_shares(layer: Layer) -> Tensor:
    """Compute the share of the energy in samples with a copy, for each row that is compared by itself.

    Copies are neighbours in the order of a random projection, so that n distances suffice.
    """
    values = layer.values if layer.parts == 1 else layer.values.mean(0)
    direction = torch.randn(values.shape[-1], generator=torch.Generator().manual_seed(0)).to(values)
    order = (values @ direction).argsort(-1)
    energy = _energy(layer).gather(-1, order)
    both = energy[..., 1:] + energy[..., :-1]
    if layer.form == "primal":
        distances = values.gather(-2, order[..., None].expand_as(values)).diff(dim=-2).square().sum(-1)
    else:
        rows = values.gather(-2, order[..., :-1, None].expand(*order.shape[:-1], -1, values.shape[-1]))
        distances = both - 2 * rows.gather(-1, order[..., 1:, None]).squeeze(-1)
    same = distances <= COPY * both
    copies = nn.functional.pad(same, (0, 1)) | nn.functional.pad(same, (1, 0))
    return ((energy * copies).sum(-1) / energy.sum(-1).clamp(min=TINY)).reshape(-1)


# ---------------------------------------------------------------------------------------------------------- text


def render(look: FirstLook, most: int = MAX_ROWS) -> str:
    """Write a look as text: its settings, a table of its pairs, and the ratio of the gradients.

    Args:
        look: The look.
        most: Largest number of pairs in the table. Of more pairs, the first and last ones are shown.
    """
    count = f"{len(look.pairs)} pairs" if len(look.pairs) != 1 else "1 pair"
    rows = max((layer.rows for layer in look.targets.values()), default=1)
    axis = look.sample_axis + (f" {rows} rows" if rows > 1 else "")
    title = (
        f"Guidance on the first batch: {look.measure}, sample axis {axis}, weight {look.weight:g}, "
        f"{look.reduction} over {count}"
    )
    ratio = "gradient of guidance over that of the task, in the weights that it reaches: "
    ratio += f"{look.gradient_ratio:.3g}" if look.gradient_ratio is not None else f"not measured ({look.not_measured})"
    return "\n".join([title, *(f"  {line}" for line in [*_table(look, most), ratio])])


def _table(look: FirstLook, most: int) -> list[str]:
    with_debiased = look.measure != DEBIASED and any(pair.debiased_cka is not None for pair in look.pairs)
    head = ["target layer", "guide layer", "target", "guide", "form", look.measure]
    lines = [head + [DEBIASED] * with_debiased]
    for pair in look.pairs:
        sides = look.targets[pair.target], look.guides[pair.guide]
        forms = dict.fromkeys(side.form for side in sides)
        line = [pair.target, pair.guide, *map(_size, sides), "/".join(forms), f"{pair.similarity:.3f}"]
        debiased = "" if pair.debiased_cka is None else f"{pair.debiased_cka:.3f}"
        lines.append(line + [debiased] * with_debiased)
    hidden = max(0, len(look.pairs) - most)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = [
        "  ".join(
            cell.rjust(width) if i > 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if hidden:
        first = 1 + (most + 1) // 2
        left = look.pairs[first - 1 : first - 1 + hidden]
        values = [pair.similarity for pair in left]
        summary = f"… {hidden} more {'pair' if hidden == 1 else 'pairs'}: {min(values):.3f} to {max(values):.3f}"
        written[first : first + hidden] = [summary]
    return [line.rstrip() for line in written]


def _size(layer: LayerLook) -> str:
    return f"{layer.samples} × {layer.features}" + (" dead" if layer.is_dead else "")
