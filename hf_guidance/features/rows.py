"""Rows of a batch: their content, and which of their positions are valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

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
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim >= 2}
    if not tensors:
        raise ValueError(f"the batch has no tensor with a sample axis and a second axis; it has {sorted(batch)}.")
    known = [tensors[name] for name in ("input_ids", "pixel_values", "inputs_embeds") if name in tensors]
    return (known or list(tensors.values()))[0]


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
