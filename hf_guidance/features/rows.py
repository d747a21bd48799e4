"""Rows of a batch: their content, and which of their positions are valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
