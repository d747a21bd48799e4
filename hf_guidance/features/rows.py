"""Rows of a batch: their content and valid positions, and the choice of the rows and tokens to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from hf_guidance.features.distributed import Ranks

INT64_MAX = torch.iinfo(torch.int64).max
Column: TypeAlias = Tensor | Sequence[str] | Sequence[int] | Sequence[float] | str | int | float | bool | None
Batch: TypeAlias = Mapping[str, Column]  # as a collator makes it; only tensors are computed with


def content_of(batch: Batch) -> Tensor:
    """Return the content of a batch's rows: token ids, pixels, embeddings, or else its first tensor with two axes.

    Args:
        batch: Inputs of a network.

    Returns:
        `(batch, …)`.

    Raises:
        ValueError: If the batch has no such tensor.
    """
    tensors = tensors_of(batch)
    if not tensors:
        raise ValueError(f"the batch has no tensor with a sample axis and a second axis; it has {sorted(batch)}.")
    known = [tensors[name] for name in ("input_ids", "pixel_values", "inputs_embeds") if name in tensors]
    return (known or list(tensors.values()))[0]


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Return the columns with a sample axis and a second axis."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim >= 2}


def masks_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the valid positions of encoder and decoder, if the batch has them.

    Args:
        tensors: Columns of the batch.

    Returns:
        `encoder` and `decoder` → `(batch, length)` of bool.
    """
    masks = {}
    labels = tensors.get("labels")
    if (mask := tensors.get("decoder_attention_mask")) is not None:
        masks["decoder"] = mask.bool()
    elif (ids := tensors.get("decoder_input_ids")) is not None:
        masks["decoder"] = torch.ones_like(ids, dtype=torch.bool) if labels is None else labels != -100
    if (mask := tensors.get("attention_mask")) is not None and mask.ndim == 2:
        masks["encoder"] = mask.bool()
    return masks


def hashes_of_rows(content: Tensor, mask: Tensor | None) -> Tensor:
    """Compute a hash of each row, `(batch,)`, that depends neither on padding nor on the order of the rows.

    Args:
        content: Content of the rows, `(batch, …)`.
        mask: Its valid positions `(batch, length)`, if they are told apart.
    """
    if mask is None or content.shape[:2] != mask.shape:
        return hashes_of(content)
    valid = over(first_valid(mask), content)
    order = in_front(mask)
    return hashes_of(content if order is None else content.take_along_dim(over(order, content), dim=1), valid)


def choose_rows(batch: Batch, count: int, seed: int, ranks: Ranks | None = None) -> Tensor | None:
    """Choose rows of a batch by a hash of their content and a seed, so that their order does not change the choice.

    Args:
        batch: Inputs of a network.
        count: Number of rows, all ranks together.
        seed: Seed of the choice.
        ranks: Processes whose batches are taken as one; None for this process alone.

    Returns:
        Indices of the chosen rows of this process in ascending order, `(k,)`; None if the batch has no more than that.

    Raises:
        ValueError: If a column has no entry for each row.
    """
    lengths = {name: len(value) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "guide_rows runs the guide on some rows, so each column needs one entry for each row, but their lengths "
            f"are {lengths}: leave guide_rows out."
        )
    content = content_of(batch)
    mask = masks_of(tensors_of(batch)).get("encoder")
    scores = mix(hashes_of_rows(content, mask) + seed) & INT64_MAX
    sizes, first = [len(scores)], 0
    if ranks is not None:
        sizes = [row[0] for row in ranks.numbers(sizes, scores.device)]
        first = sum(sizes[: ranks.rank])
        scores = ranks.gather(scores, sizes)
    if len(scores) <= count:
        return None
    chosen = scores.argsort(stable=True)[:count].sort().values - first
    return chosen[(chosen >= 0) & (chosen < len(content))]


def choose_tokens(
    valid: Tensor, hashes: Tensor, count: int, seed: int, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """Choose tokens by a hash of row content, position and seed, so that row order does not change the choice.

    Args:
        valid: Positions to choose from, `(batch, length)`.
        hashes: Hash of each row, `(batch,)`.
        count: Largest number of tokens, all ranks together.
        seed: Seed of the choice.
        ranks: Processes whose batches are taken as one; None for this process alone.

    Returns:
        Rows and positions of the chosen tokens of this process.
    """
    total = int(valid.sum())
    if ranks is not None:
        total = sum(row[0] for row in ranks.numbers([total], hashes.device))
    if total <= count:
        rows, positions = valid.nonzero(as_tuple=True)
        return rows, positions
    score = _scores(valid, hashes, seed)
    if ranks is not None:
        scores = torch.cat([score.flatten(), score.new_full((count + 1,), INT64_MAX)])
        rows, positions = _below_the_last(score, ranks.smallest(scores, count + 1)).nonzero(as_tuple=True)
        return rows, positions
    smallest, chosen = score.flatten().topk(count + 1, largest=False)
    chosen = chosen[_below_the_last(smallest, smallest)]
    return chosen // valid.shape[1], chosen % valid.shape[1]


def choose_within_rows(valid: Tensor, hashes: Tensor, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Choose up to `count` positions of each row, as `choose_tokens` does, and group the rows by their number.

    Args:
        valid: Positions to choose from, `(batch, length)`, in front of each row.
        hashes: Hash of each row, `(batch,)`.
        count: Largest number of positions of a row.
        seed: Seed of the choice.

    Returns:
        Groups of rows `(r,)` with positions `(r, n)`, from few positions to many.
    """
    numbers = valid.sum(1)
    groups = []
    for n in numbers.clamp(max=count).unique().tolist():
        rows = (numbers.clamp(max=count) == n).nonzero().flatten()
        if n < count or valid.shape[1] <= count:
            positions = torch.arange(n, device=valid.device).expand(len(rows), n)
        else:
            scores = _scores(valid[rows], hashes[rows], seed)
            positions = scores.topk(n, dim=1, largest=False).indices.sort(1).values
        groups.append((rows, positions))
    return groups


def _scores(valid: Tensor, hashes: Tensor, seed: int) -> Tensor:
    positions = torch.arange(valid.shape[1], device=valid.device)
    score = mix(hashes[:, None] + mix(positions + 1)[None, :] + seed) & INT64_MAX
    return torch.where(valid, score, INT64_MAX)


def _below_the_last(score: Tensor, smallest: Tensor) -> Tensor:
    """Select the scores below the last of the smallest ones; if there are none, those equal to it.

    Equal rows have equal scores. They are taken or left together, so that the choice does not depend on how rows are
    split over batches.
    """
    last = smallest[-1]
    return torch.where(smallest[0] < last, score < last, score <= last)


def documents_of(batch: Batch) -> list[slice]:
    """Return the positions of each document in a packed batch: one row, in which position ids restart.

    The list is empty for any other batch.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or len(positions) != 1:
        return []
    starts = (positions[0, 1:] <= positions[0, :-1]).nonzero().flatten() + 1
    bounds = [0, *starts.tolist(), positions.shape[1]]
    return [slice(start, end) for start, end in pairwise(bounds)] if len(bounds) > 2 else []


def is_packed(batch: Batch) -> bool:
    """Tell whether a batch is one row of several documents, as `DataCollatorWithFlattening` makes it."""
    return bool(documents_of(batch)) or "cu_seq_lens_q" in batch or "seq_idx" in batch


def unpacked(documents: Sequence[slice], packed: Tensor) -> Tensor:
    """Put each document of a packed row `(1, length, …)` in a row of its own, `(documents, longest, …)`.

    What follows a short document is a repetition of its first position.
    """
    longest = max(place.stop - place.start for place in documents)
    offsets = torch.arange(longest)
    places = [torch.where(offsets < d.stop - d.start, offsets, 0) + d.start for d in documents]
    return packed[0][torch.stack(places).to(packed.device)]


def take_rows(batch: Batch, rows: Tensor) -> dict[str, Column]:
    """Return a batch of these rows, given by their indices."""
    return {k: v[rows.to(v.device)] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}


def mix(value: Tensor) -> Tensor:
    """Hash int64 values to all 64 bits. Products wrap around."""
    for factor in (-7046029254386353131, -4658895280553007687):
        value = value ^ (value >> 29)
        value *= factor
    return value ^ (value >> 32)


def first_valid(mask: Tensor) -> Tensor:
    """Return `(batch, length)`: true at as many first positions of each row as the mask has valid ones."""
    return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)


def in_front(mask: Tensor) -> Tensor | None:
    """Return the order that moves each row's valid positions to its front; None if they are there."""
    if (mask[:, :-1] >= mask[:, 1:]).all():
        return None
    return mask.int().argsort(dim=1, descending=True, stable=True)


def over(mask: Tensor, features: Tensor) -> Tensor:
    """Append axes to `(batch, length)` so that it spreads over features `(batch, length, …)`."""
    return mask.reshape(mask.shape + (1,) * (features.ndim - 2))


def hashes_of(content: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute a hash of each row's content, `(batch,)`, that does not depend on padding.

    Args:
        content: Rows `(batch, …)`.
        valid: Which entries count, spread over the content; None for all.
    """
    content = content if not content.is_floating_point() else content.float().view(torch.int32)
    if valid is not None:
        content = torch.where(valid, content, -1)
    content = content.flatten(1).long()
    places = mix(torch.arange(content.shape[1], device=content.device) + 1)
    return torch.where(content == -1, 0, mix(content + places)).sum(1)
