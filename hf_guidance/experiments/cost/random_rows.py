"""Random rows in memory, for measurements that depend only on sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class RandomRows(Dataset[dict[str, Tensor]]):
    """A fixed number of random rows, the same for the same seed.

    Args:
        columns: Name of each column → tensor whose first axis is the row.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[row] for name, values in self.columns.items()}

    def with_ids(self, name: str) -> RandomRows:
        """Return the same rows with a column of ids."""
        return RandomRows({**self.columns, name: torch.arange(len(self))})


def random_images(rows: int, size: int, labels: int, *, guide_size: int | None = None, seed: int = 0) -> RandomRows:
    """Draw normal pixels `(3, size, size)` and labels; `guide_pixel_values` too if the guide's size differs."""
    generator = torch.Generator().manual_seed(seed)
    columns = {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
    if guide_size not in (None, size):
        columns["guide_pixel_values"] = torch.randn(rows, 3, guide_size, guide_size, generator=generator)
    return RandomRows({**columns, "labels": torch.randint(labels, (rows,), generator=generator)})


def random_tokens(rows: int, length: int, vocabulary: int, *, seed: int = 0) -> RandomRows:
    """Draw rows of token ids `(length,)`, with equal labels."""
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    kinds: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    return RandomRows(kinds)
