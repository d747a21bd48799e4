"""A run that is not guided though it was to be: what it says, when, and what it leaves behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gpt2, llama, token_rows
from safetensors.torch import load_file
from torch import Tensor, nn
from trainers import make_trainer, same, train_logs, trained, weights
from transformers import DataCollatorWithFlattening, GPT2LMHeadModel, Trainer
from transformers.integrations import integration_utils
from transformers.trainer_utils import HPSearchBackend

from hf_guidance import GuidanceConfig, GuidanceLoss, GuidanceMixin, GuidanceTrainer

ONE_ROW = (
    "linear_cka needs at least 3 samples, and the batch has 1 row: raise per_device_train_batch_size, or set "
    "sample_axis='token' if documents are packed into one row"
)


def listed_rows() -> list[dict[str, list[int]]]:
    return [{name: value.tolist() for name, value in row.items()} for row in token_rows()]


def test_packed_batches_on_the_sequence_axis_warn_at_once_and_end_in_an_error_that_keeps_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packing = {"data_collator": DataCollatorWithFlattening(), "train_dataset": listed_rows()}
    trainer = make_trainer(tmp_path, gpt2(), llama(), **packing)
    with (
        caplog.at_level(logging.WARNING, "hf_guidance"),
        pytest.raises(RuntimeError, match=rf"None of the 3 optimizer steps was guided: {ONE_ROW}\. The network was"),
    ):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_guidance")]
    assert [message.startswith(f"Optimizer step 1 is not guided: {ONE_ROW}.") for message in said] == [True]
    assert [log["guidance/weight"] for log in train_logs(trainer)] == [0, 0, 0]
    assert [log["guidance/skipped_batches"] for log in train_logs(trainer)] == [1, 1, 1]
    kept, now = load_file(tmp_path / "model.safetensors"), weights(trainer.model)
    assert all(torch.equal(value, now[name]) for name, value in kept.items())


def test_packed_batches_on_the_token_axis_are_guided(tmp_path: Path) -> None:
    packing = {"data_collator": DataCollatorWithFlattening(), "train_dataset": listed_rows()}
    logs = trained(make_trainer(tmp_path, gpt2(), llama(), sample_axis="token", **packing))[1]
    assert all(log["guidance/weight"] == 1 and log["guidance/loss"] > 0 for log in logs)


def test_the_first_batch_that_is_too_small_is_said_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = token_rows(6)  # batches of 4 and 2
    with caplog.at_level(logging.WARNING, "hf_guidance"):
        logs = trained(make_trainer(tmp_path, gpt2(), llama(), train_dataset=rows, max_steps=4))[1]
    assert [log["guidance/weight"] for log in logs] == [1, 0, 1, 0]
    assert caplog.text.count("is not guided") == 1
    assert (
        "Optimizer step 2 is not guided: linear_cka needs at least 3 samples, and the batch has 2 rows: raise"
        in caplog.text
    )


def test_settings_that_change_after_construction_are_checked_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "per_device_train_batch_size is 1, but linear_cka needs at least 3 samples a batch"
    trainer = make_trainer(tmp_path, gpt2(), llama())
    trainer.args.per_device_train_batch_size = 1
    with pytest.raises(ValueError, match=words):
        trainer.train()
    searched = make_trainer(tmp_path, None, llama(), model_init=lambda: gpt2())
    searched.hp_search_backend = HPSearchBackend.WANDB  # whose trials are plain dicts
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    with pytest.raises(ValueError, match=words):
        searched.train(trial={"per_device_train_batch_size": 1})
    assert (trainer.state.global_step, searched.state.global_step) == (0, 0)


class OwnStep(Trainer):
    """Computes its loss without `compute_loss`."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class GuidedOwnStep(GuidanceMixin, OwnStep):
    pass


def test_a_trainer_that_never_asks_for_the_loss_ends_in_an_error(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, gpt2(), llama())
    trainer = GuidedOwnStep(gpt2(), plain.args, guide=llama(), train_dataset=plain.train_dataset)
    with pytest.raises(
        RuntimeError, match=r"None of the 3 .*: the trainer asked for no loss of a batch while the model"
    ):
        trainer.train()


@pytest.mark.parametrize("changes", [{"guidance_weight": 0.0}, {"guidance_stop_step": 1, "max_steps": 1}])
def test_a_run_that_was_not_to_be_guided_further_is_no_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_trainer(tmp_path, gpt2(), llama(), **changes).train()


def test_a_part_of_a_run_without_guided_steps_is_no_error_after_one_that_had_some(tmp_path: Path) -> None:
    rows = token_rows(6)
    saving = {"train_dataset": rows, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, gpt2(), llama(), max_steps=1, **saving).train()
    trainer = make_trainer(tmp_path, gpt2(), llama(), max_steps=2, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert [log["guidance/weight"] for log in train_logs(trainer)] == [1, 0]


def test_in_a_loop_of_ones_own_the_watched_forward_says_why_it_is_not_guided() -> None:
    target = gpt2()
    loss = GuidanceLoss(target, llama(), GuidanceConfig(measure="ridge", sample_axis="token", max_tokens=8))
    batch = {"input_ids": torch.arange(2)[None], "labels": torch.arange(2)[None]}
    with loss.watch(batch) as watched:
        target(**watched.inputs)
    assert watched.loss is None
    assert watched.why_unguided.startswith("ridge needs at least 3 samples, and the batch has 2 valid tokens: raise")


# ---------------------------------------------------------------------------------------------------- at the last step

SAVING = {"save_strategy": "steps", "save_steps": 1}
ENDS = {
    "in the middle of an epoch": {"max_steps": 4},  # of 6 steps
    "at the end of an epoch": {"max_steps": 6},
    "in the middle of the second": {"max_steps": 8},
    "after epochs": {"num_train_epochs": 1, "max_steps": -1},
    "after a part of one": {"num_train_epochs": 0.5, "max_steps": -1},
    "while accumulating": {"max_steps": 2, "gradient_accumulation_steps": 2},
    "once an epoch": {"max_steps": 4, "save_strategy": "epoch", "eval_strategy": "epoch"},
}


@pytest.mark.parametrize(
    ("end", "guidance"),
    [*((end, "guided") for end in ENDS), *(("in the middle of an epoch", kind) for kind in ("weight 0", "no guide"))],
)
def test_going_on_from_the_checkpoint_of_the_last_step_takes_no_step(tmp_path: Path, end: str, guidance: str) -> None:
    settings = {**SAVING, "lr_scheduler_type": "constant", "eval_dataset": token_rows(4), **ENDS[end]}
    settings |= {"guidance_weight": 0.0} if guidance == "weight 0" else {}

    def trainer(seed: int) -> GuidanceTrainer:
        return make_trainer(tmp_path, gpt2(seed=seed), None if guidance == "no guide" else llama(), **settings)

    first = trainer(0)
    first.train()
    again = trainer(5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == first.state.global_step == first.state.max_steps
    assert same(weights(again.model), weights(first.model))
    longer = make_trainer(tmp_path, gpt2(), None if guidance == "no guide" else llama(), **settings | {"max_steps": 9})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 9


def test_a_stream_goes_on_from_its_last_step_without_another(tmp_path: Path) -> None:
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(token_rows())

    settings = {**SAVING, "train_dataset": Rows()}
    first = make_trainer(tmp_path, gpt2(), llama(), **settings)
    first.train()
    again = make_trainer(tmp_path, gpt2(seed=5), llama(), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert same(weights(again.model), weights(first.model))


def test_plain_trainer_would_take_one(tmp_path: Path) -> None:
    """Should this fail, transformers has mended it, and `_run_epoch` can go."""
    own = make_trainer(tmp_path, gpt2(), **SAVING)
    own.train()
    plain = Trainer(gpt2(), own.args, train_dataset=own.train_dataset)
    plain.train(resume_from_checkpoint=True)
    assert plain.state.global_step == 4
    assert isinstance(plain.model, GPT2LMHeadModel)
