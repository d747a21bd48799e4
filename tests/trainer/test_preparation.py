"""Preparation on the first rows: which batches these are, and that reading them moves nothing of the training.

`tests/guide/test_cache.py` trains with the cache that is opened here.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import LENGTH, NormNet, gpt2, llama, token_rows
from datasets import Dataset
from torch import Tensor
from trainers import make_trainer

from hf_guidance.trainer.preparation import calibrate, first_batches, open_cache


class Random(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows that draw from every random state each time they are read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        values = [index, random.randrange(17), np.random.randint(17), int(torch.randint(17, ()))]
        return {"input_ids": torch.tensor(values), "labels": torch.tensor(values)}


class Counting:
    """A collator with a state of its own."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.seen.append(len(rows))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_first_batches_are_full_in_order_and_leave_every_random_state_alone(tmp_path: Path) -> None:
    collator = Counting()
    trainer = make_trainer(tmp_path, gpt2(), llama(), train_dataset=Random(), data_collator=collator)
    before = states()
    batches = [batch["input_ids"] for batch in first_batches(trainer, trainer.train_dataset)]
    assert states() == before
    assert collator.seen == []
    assert torch.cat(batches)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # of ten rows in batches of four
    same, other = (next(first_batches(trainer, trainer.train_dataset, reading))["input_ids"] for reading in (0, 1))
    assert torch.equal(batches[0], same)
    assert not torch.equal(batches[0], other), "augmentation follows the reading"


def test_columns_that_the_target_does_not_take_are_left_out(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**{k: v.tolist() for k, v in row.items()}, "note": 1} for row in token_rows(8)])
    trainer = make_trainer(tmp_path, gpt2(), llama(), train_dataset=rows)
    assert next(first_batches(trainer, trainer.train_dataset)).keys() == {"input_ids", "labels"}


def test_calibration_takes_the_mean_of_the_first_batches_statistics(tmp_path: Path) -> None:
    guide, config = NormNet(), {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 2}
    trainer = make_trainer(tmp_path, gpt2(), guide, **config)
    calibrate(trainer)
    ids = torch.stack([row["input_ids"] for row in token_rows()[:8]])
    means = guide.embed(ids).reshape(2, 4, LENGTH, 8).mean((1, 3))
    torch.testing.assert_close(guide.norm.running_mean, means.mean(0))


def test_too_few_batches_to_calibrate_on_are_an_error(tmp_path: Path) -> None:
    config = {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 7}
    with pytest.raises(ValueError, match="calibration_batches is 7, but the training data has 6 full batches"):
        calibrate(make_trainer(tmp_path, gpt2(), NormNet(), **config))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (token_rows(3), "the training data has 3 rows, fewer than one batch of 4"),
        (Random(), "the first rows differ when they are read twice"),
        (iter(()), "needs a dataset with a length"),
    ],
    ids=["few", "augmented", "stream"],
)
def test_data_that_cannot_be_cached_are_refused(rows: Any, words: str, tmp_path: Path) -> None:
    cached = {"cache_guide": str(tmp_path / "cache"), "sketch": 4, "sample_id_column": "id"}
    trainer = make_trainer(tmp_path / "out", gpt2(), llama(), **cached)
    trainer.train_dataset = rows
    with pytest.raises(ValueError, match=words):
        open_cache(trainer)
    assert not (tmp_path / "cache").exists()
