"""A batch: rows that are taken of it, and the documents of a packed one."""

from __future__ import annotations

import pytest
import torch

from hf_guidance.features.batch import documents_of, take_rows


def test_taken_rows_are_those_of_every_column_that_has_rows() -> None:
    ids = torch.arange(15).reshape(3, 5)
    batch = {"input_ids": ids, "id": torch.arange(3), "scale": torch.tensor(2.0), "name": "x"}
    taken = take_rows(batch, torch.tensor([2, 0]))
    assert torch.equal(taken["input_ids"], batch["input_ids"][[2, 0]])
    assert taken["id"].tolist() == [2, 0]
    assert (taken["scale"], taken["name"]) == (batch["scale"], "x")


def test_position_ids_that_restart_at_padding_are_not_packed_documents() -> None:
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    ids = torch.arange(10)[None]
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    assert documents_of({"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}) == []
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2]])
    assert len(documents_of({"input_ids": ids, "position_ids": restarting})) == 3


@pytest.mark.parametrize(("positions", "documents"), [([0, 1, 2, 0, 1], [(0, 3), (3, 5)]), ([0, 1, 2], [(0, 3)])])
def test_position_ids_that_stay_0_at_the_end_are_padding(
    positions: list[int], documents: list[tuple[int, int]]
) -> None:
    padded = torch.tensor([[*positions, 0, 0, 0]])
    assert [(d.start, d.stop) for d in documents_of({"position_ids": padded})] == documents
    assert documents_of({"position_ids": torch.zeros(1, 4, dtype=torch.long)}) != []
