"""A run that is not guided though it was to be: what it says, when, and what it leaves behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import gpt2, linear, llama, token_batch, token_rows
from safetensors.torch import load_file
from torch import Tensor, nn
from trainers import make_trainer, same, train_logs, trained, weights
from transformers import DataCollatorWithFlattening, GPT2LMHeadModel, Trainer, TrainerState
from transformers.integrations import integration_utils
from transformers.trainer_utils import HPSearchBackend

from hf_guidance import GuidanceLoss, GuidanceMixin, GuidanceTrainer
from hf_guidance.schedule import Weights
from hf_guidance.trainer.steps import GuidedSteps

SAVING = {"save_strategy": "steps", "save_steps": 1}
ONE_ROW = (
    "linear_cka needs at least 3 samples, and the batch has 1 row, into which documents are packed: set "
    "sample_axis='token'"
)


def listed_rows() -> list[dict[str, list[int]]]:
    return [{name: value.tolist() for name, value in row.items()} for row in token_rows()]


def flattened_without_positions(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """A packed row whose documents only `cu_seq_lens_q` tells."""
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    del packed["position_ids"]
    return packed


def test_packed_batches_without_positions_warn_at_once_and_end_in_an_error_that_keeps_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packing = {"data_collator": flattened_without_positions, "train_dataset": listed_rows()}
    trainer = make_trainer(tmp_path, gpt2(), llama(), **packing)
    with (
        caplog.at_level(logging.WARNING, "hf_guidance"),
        pytest.raises(RuntimeError, match=rf"No optimizer step of 3 was guided: {ONE_ROW}\. The network was"),
    ):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_guidance")]
    assert [message.startswith(f"Optimizer step 1 is not guided: {ONE_ROW}.") for message in said] == [True]
    assert [log["guidance/weight"] for log in train_logs(trainer)] == [0, 0, 0]
    assert [log["guidance/skipped_batches"] for log in train_logs(trainer)] == [1, 1, 1]
    kept, now = load_file(tmp_path / "model.safetensors"), weights(trainer.model)
    assert all(torch.equal(value, now[name]) for name, value in kept.items())


@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
def test_packed_batches_are_guided(tmp_path: Path, axis: str) -> None:
    packing = {"data_collator": DataCollatorWithFlattening(), "train_dataset": listed_rows()}
    logs = trained(make_trainer(tmp_path, gpt2(), llama(), sample_axis=axis, **packing))[1]
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
        RuntimeError, match=r"No optimizer step of 3 .*compute_loss was not called in training mode \(does a subclass"
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
    loss = GuidanceLoss(target, llama(), linear(measure="ridge", sample_axis="token", max_tokens=8))
    batch = {"input_ids": torch.arange(2)[None], "labels": torch.arange(2)[None]}
    with loss.watch(batch) as watched:
        target(**watched.inputs)
    assert watched.loss is None
    assert watched.why_unguided.startswith("ridge needs at least 3 samples, and the batch has 2 valid tokens: raise")


def test_a_run_that_was_not_guided_fails_again_when_it_is_resumed_at_its_end(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, gpt2(), llama(), **SAVING)
    for resume in (None, True):
        trainer = GuidedOwnStep(gpt2(), plain.args, guide=llama(), train_dataset=plain.train_dataset)
        with pytest.raises(RuntimeError, match="No optimizer step of 3 was guided"):
            trainer.train(resume_from_checkpoint=resume)


def test_a_part_that_logged_nothing_before_a_stop_counts_all_the_same(tmp_path: Path) -> None:
    rows = {"train_dataset": token_rows(5), **SAVING, "logging_steps": 100}  # batches of 4 and 1
    make_trainer(tmp_path, gpt2(), llama(), max_steps=3, **rows).train()
    make_trainer(tmp_path, gpt2(), llama(), max_steps=4, **rows).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_version_does_not_say_how_many_steps_were_guided(tmp_path: Path) -> None:
    rows = {"train_dataset": token_rows(5), **SAVING}
    make_trainer(tmp_path, gpt2(), llama(), max_steps=1, **rows).train()
    path = tmp_path / "checkpoint-1" / "rng_state.json"
    origin = json.loads(path.read_text())
    assert origin.pop("guided_steps") == 1
    path.write_text(json.dumps(origin))
    make_trainer(tmp_path, gpt2(), llama(), max_steps=2, **rows).train(resume_from_checkpoint=True)


def test_steps_that_are_left_out_were_not_guided(tmp_path: Path) -> None:
    guide = llama()
    with torch.no_grad():
        guide.norm.weight.fill_(float("nan"))
    trainer = make_trainer(tmp_path, gpt2(), guide, guidance_every=2, on_non_finite="skip", max_steps=4)
    with pytest.raises(RuntimeError, match="No optimizer step of 4 was guided"):
        trainer.train()


def test_a_run_of_which_some_steps_were_not_guided_says_how_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stops(GuidanceTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step:
                return model(**inputs).loss
            return super().compute_loss(model, inputs, *args, **kwargs)

    plain = make_trainer(tmp_path, gpt2(), llama())
    Stops(gpt2(), plain.args, guide=llama(), train_dataset=plain.train_dataset).train()
    assert "Only 1 of the 3 optimizer steps that should have been guided were." in caplog.text


def test_a_warm_up_longer_than_epochs_make_the_run_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), guidance_warmup_steps=7, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match="guidance_warmup_steps is 7, but the run has 6 optimizer steps"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_warm_up_is_logged_and_all_its_steps_are_guided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), guidance_warmup_steps=2, guidance_weight=3.0, prealign_steps=1)
    logs = trained(trainer)[1]
    assert [log["guidance/weight"] for log in logs] == [3.0, 1.5, 3.0]
    assert "should have been guided" not in caplog.text


def test_a_run_of_pre_alignment_alone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, gpt2(), llama(), prealign_steps=3).train()
    assert "All 3 optimizer steps are pre-alignment, none is of the task: see prealign_steps." in caplog.text
    caplog.clear()
    make_trainer(tmp_path, gpt2(), llama(), prealign_steps=2).train()
    assert caplog.text == ""


def test_a_batch_of_one_row_cannot_be_shuffled_and_is_not_guided(tmp_path: Path) -> None:
    packing = {"data_collator": DataCollatorWithFlattening(), "train_dataset": listed_rows()}
    trainer = make_trainer(tmp_path, gpt2(), llama(), sample_axis="token", guide_input="shuffled", **packing)
    with pytest.raises(
        RuntimeError, match="guide_input='shuffled' exchanges the rows of a batch, but this batch has only one"
    ):
        trainer.train()


def test_a_last_batch_of_one_row_is_not_taken_for_packed_documents() -> None:
    target, batch = gpt2(), {name: value[:1] for name, value in token_batch().items()}
    with GuidanceLoss(target, llama()).watch(batch) as watched:
        target(**watched.inputs)
    assert "the batch has 1 row: raise per_device_train_batch_size, or set dataloader_drop" in watched.why_unguided


# ---------------------------------------------------------------------------------------------------- at the last step

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


# ------------------------------------------------------------------------------------------------------ the count alone

EVERY = Weights(guidance=1.0, task=1.0)
GUIDED, UNGUIDED = (SimpleNamespace(loss=loss, weights=EVERY, why_unguided="few rows") for loss in (0.5, None))


def counted(*steps: list[Any], left_out: bool = False) -> GuidedSteps:
    """A count of optimizer steps, each given as what its micro-steps came to."""
    counter = GuidedSteps(lambda: None, lambda: lambda step: EVERY, lambda: left_out)
    for step, micro_steps in enumerate(steps):
        counter.on_step_begin()
        for watched in micro_steps:
            counter.note(watched, step)
        counter.on_optimizer_step()
    return counter


def test_a_step_counts_once_if_any_of_its_micro_steps_was_guided(caplog: pytest.LogCaptureFixture) -> None:
    counter = counted([GUIDED, GUIDED], [UNGUIDED, GUIDED], [UNGUIDED, UNGUIDED])
    assert (counter.guided, counter.total()) == (2, 2)
    assert caplog.text.count("is not guided: few rows") == 1
    counter.before = 4
    assert counter.total() == 6
    counter.before = None
    assert counter.total() is None


def test_a_step_that_is_left_out_does_not_count() -> None:
    assert counted([GUIDED], left_out=True).guided == 0


def test_a_run_without_any_guided_step_is_kept_and_is_an_error() -> None:
    kept: list[bool] = []
    counter, state = counted([UNGUIDED]), TrainerState(global_step=1)
    with pytest.raises(RuntimeError, match=r"No optimizer step of 1 was guided: few rows\. .* is in here"):
        counter.check_any(state, lambda: kept.append(True), "here")
    assert kept == [True]
    counted([GUIDED]).check_any(state, lambda: pytest.fail("kept"), "here")
