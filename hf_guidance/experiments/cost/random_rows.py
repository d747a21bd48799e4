"""Rows of noise in memory, for what depends on their sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class RandomRows(Dataset[dict[str, Tensor]]):
    """A fixed number of random rows, the same for the same seed.

    Args:
        columns: name of each column → rows, first axis the row.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[row] for name, values in self.columns.items()}

    def with_ids(self, name: str) -> RandomRows:
        """The same rows, numbered in a column of that name."""
        return RandomRows({**self.columns, name: torch.arange(len(self))})


def random_images(rows: int, size: int, labels: int, *, guide_size: int | None = None, seed: int = 0) -> RandomRows:
    """Normal pixels ``(3, size, size)`` and a label a row; ``guide_pixel_values`` too if the guide's size differs."""
    generator = torch.Generator().manual_seed(seed)
    columns = {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
    if guide_size not in (None, size):
        columns["guide_pixel_values"] = torch.randn(rows, 3, guide_size, guide_size, generator=generator)
    return RandomRows({**columns, "labels": torch.randint(labels, (rows,), generator=generator)})


def random_tokens(rows: int, length: int, vocabulary: int, *, seed: int = 0) -> RandomRows:
    """Token ids ``(length,)`` a row, the labels the same."""
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    kinds: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    return RandomRows(kinds)
