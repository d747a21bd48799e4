"""A batch as a collator makes it. A packed one is one row of several documents, each of which is a row to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

Column: TypeAlias = Tensor | Sequence[str] | Sequence[int] | Sequence[float] | str | int | float | bool | None
Batch: TypeAlias = Mapping[str, Column]  # as a collator makes it; only tensors are computed with


def documents_of(batch: Batch) -> list[slice]:
    """Return the positions of each document in a packed batch: one row, in which position ids restart.

    Position ids that stay 0 at the end are padding, not documents of one token. The list is empty for any other batch.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or len(positions) != 1:
        return []
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():  # positions restart at padding, too
        return []
    length = positions.shape[1]
    end = int(positions[0].nonzero()[-1]) + 1 if positions.any() else length
    starts = (positions[0, 1:end] <= positions[0, : end - 1]).nonzero().flatten() + 1
    bounds = [0, *starts.tolist(), end]
    return [slice(start, end) for start, end in pairwise(bounds)] if len(bounds) > 2 or end < length else []


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
