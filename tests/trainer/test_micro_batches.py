"""Micro-batches: rows that are compared by themselves weigh alike, however they are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, arguments, gpt2, llama, token_rows
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from trainers import SGD, trained

from hf_guidance import GuidanceConfig, GuidanceTrainer
from hf_guidance.trainer.micro_batches import MicroBatchesMixin


def test_within_rows_a_batch_of_one_row_is_guided(tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=1)
    guidance = GuidanceConfig(sample_axis="within")
    trainer = GuidanceTrainer(gpt2(), args, train_dataset=token_rows(), guide=llama(), guidance=guidance)
    logs = trained(trainer)[1]
    assert [log["guidance/weight"] for log in logs] == [1, 1, 1]
    assert all(0 < log["guidance/loss"] < 6 for log in logs)


def test_the_look_at_the_first_micro_batch_can_be_left_out(tmp_path: Path) -> None:
    looks = []
    for takes in (MicroBatchesMixin.takes_first_look, False):
        trainer = GuidanceTrainer(gpt2(), arguments(tmp_path), train_dataset=token_rows(), guide=llama())
        trainer.takes_first_look = takes
        trainer.train()
        looks.append(trainer.first_look)
    assert looks[0] is not None
    assert looks[1] is None


class Model(nn.Sequential):
    """Stands in for a model of sentence-transformers."""

    def forward(self, **inputs: Tensor) -> Any:
        return self[0](**inputs)


Model.__module__ = "sentence_transformers.base.model"


def test_a_network_that_is_replaced_inside_the_model_is_the_one_that_is_guided(tmp_path: Path) -> None:
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = GuidanceTrainer(Model(gpt2()), args, train_dataset=token_rows(), guide=llama(), guidance=GuidanceConfig())
    trainer.train()
    trainer.model[0] = other = gpt2(seed=5)
    trainer.train()
    assert trainer.guidance_loss.target is other
    assert trainer.state.log_history[-2]["guidance/weight"] == 1


def ragged(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = [row["input_ids"] for row in rows]
    padded, mask = (pad_sequence(x, batch_first=True) for x in (ids, [torch.ones_like(row) for row in ids]))
    return {"input_ids": padded, "attention_mask": mask, "labels": torch.where(mask.bool(), padded, -100)}


def test_within_rows_accumulation_gives_the_step_of_one_batch_though_rows_are_left_out(tmp_path: Path) -> None:
    lengths = [6, 2, 5, 3, 2, 2, 7, 4]  # debiased CKA needs 4 positions: 2 rows of 4, then 2 of 4 in another split
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(VOCABULARY, (n,), generator=generator)} for n in lengths]
    found = []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        settings: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path / str(size), max_steps=1, **SGD, **settings)
        guidance = GuidanceConfig(sample_axis="within", measure="debiased_cka")
        data = {"train_dataset": rows, "data_collator": ragged}
        weights, (log,) = trained(GuidanceTrainer(gpt2(), args, guide=llama(), guidance=guidance, **data))
        found.append((weights, log["guidance/loss"]))
    (whole, loss), *others = found
    for weights, other in others:
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in whole.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
