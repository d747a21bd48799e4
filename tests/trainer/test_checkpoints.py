"""Which checkpoints are gone on with, and what a run may change when it goes on."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import arguments, gpt2, linear, llama, token_rows
from trainers import make_trainer, same, trained
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_guidance import GuidanceTrainer
from hf_guidance.trainer.checkpoints import check_goes_on, fault_of, last_complete_checkpoint
from hf_guidance.trainer.checks import check_machine, check_settings, check_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided run with checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, gpt2(), llama(), **SAVING).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------- whole or torn

CUT = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", CUT)
def test_a_checkpoint_with_a_file_cut_off_is_passed_over_and_refused_by_name(run: Path, name: str) -> None:
    path = run / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    trainer = make_trainer(run, gpt2(), llama(), **SAVING)
    with pytest.raises(ValueError, match=rf"Cannot resume from .*checkpoint-3: its {name} is cut off\. resume_"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "it has no weights"),
        ("optimizer.pt", r"it has no optimizer state \(save_only_model\?\)"),
        ("trainer_state.json", r"it has no trainer_state\.json, which is written last"),
        ("scheduler.pt", r"it has no scheduler\.pt"),
        ("rng_state.pth", r"it has no rng_state\.pth"),
        ("guidance_config.json", r"it has no guidance_config\.json"),
    ],
)
def test_a_checkpoint_that_lacks_a_file_is_not_whole(run: Path, name: str, words: str) -> None:
    (run / "checkpoint-3" / name).unlink()
    trainer = make_trainer(run, gpt2(), llama(), **SAVING)
    with pytest.raises(ValueError, match=rf"Cannot resume from .*checkpoint-3: {words}"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_the_random_state_of_every_rank_has_to_be_there(run: Path) -> None:
    place = run / "checkpoint-3"
    origin = json.loads((place / "rng_state.json").read_text())
    (place / "rng_state.json").write_text(json.dumps(origin | {"world_size": 2}))
    shutil.copy(place / "rng_state.pth", place / "rng_state_0.pth")
    assert fault_of(place) == "it has no rng_state_1.pth"
    shutil.copy(place / "rng_state.pth", place / "rng_state_1.pth")
    assert fault_of(place) is None


def test_true_takes_the_last_whole_checkpoint_and_ends_in_the_same_weights(finished: Path, run: Path) -> None:
    expected = torch.load(finished / "checkpoint-3" / "optimizer.pt")["state"]
    shutil.rmtree(run / "checkpoint-3")
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"PK")
    trainer = make_trainer(run, gpt2(seed=5), llama(), **SAVING)
    steps = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=True)
    assert steps == [1, 2]
    got = torch.load(run / "checkpoint-3" / "optimizer.pt")["state"]
    assert all(torch.equal(got[i]["exp_avg"], expected[i]["exp_avg"]) for i in expected)


def test_words_when_there_is_no_whole_checkpoint(run: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (run / f"checkpoint-{number}" / "trainer_state.json").unlink()
    for folder, words in (
        (run, r"; found checkpoint-3: it has no trainer_state\.json.*checkpoint-1: "),
        (tmp_path, r"\."),
    ):
        trainer = make_trainer(folder, gpt2(), llama(), **SAVING)
        with pytest.raises(ValueError, match=rf"There is no complete checkpoint in .* to resume from{words}"):
            trainer.train(resume_from_checkpoint=True)


def test_words_when_the_named_checkpoint_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Cannot resume from /nowhere: there is no such folder"):
        make_trainer(tmp_path, gpt2()).train(resume_from_checkpoint="/nowhere")


def test_the_state_of_an_earlier_run_does_not_vouch_for_a_checkpoint_that_is_being_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(run, gpt2(), llama(), **SAVING, learning_rate=0.1, max_steps=1)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)  # after the weights
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (run / "checkpoint-1" / "optimizer.pt").is_file()
    assert fault_of(run / "checkpoint-1") == "it has no trainer_state.json, which is written last"


# ------------------------------------------------------------------------------------------ what the run began with


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measure": "rsa"}, "measure was 'linear_cka', is 'rsa'"),
        ({"layer_mapping": "reversed"}, "layer_mapping was 'even', is 'reversed'"),
        ({"sample_axis": "token"}, "sample_axis was 'sequence', is 'token'"),
        ({"guidance_weight": 0.5}, r"guidance_weight was 1\.0, is 0\.5"),
        ({"guide_input": "noise"}, "guide_input was 'batch', is 'noise'"),
        ({"guidance_warmup_steps": 2}, "guidance_warmup_steps was 0, is 2"),
        ({"guidance_stop_similarity": 0.5}, r"guidance_stop_similarity was None, is 0\.5"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size was 4, is 8"),
        ({"seed": 8}, "seed was 7, is 8"),
        ({"data_seed": 8}, "data_seed was None, is 8"),
    ],
)
def test_a_change_of_what_is_trained_is_refused_and_named(run: Path, change: dict[str, Any], words: str) -> None:
    trainer = make_trainer(run, gpt2(), llama(), **SAVING, **change)
    with pytest.raises(ValueError, match=rf"checkpoint-2 was trained with other settings: {words}\. Resuming would"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"log_measures": ["rsa"]}, "log_measures was ['debiased_cka'], is ['rsa']."),
        ({"eval_similarity": True}, "eval_similarity was False, is True."),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1, is 2. Data order, randomness or"),
        ({"bf16": True}, "precision was 'float32', is 'bf16'. Data order, randomness or rounding will differ"),
    ],
)
def test_a_harmless_change_is_said(
    run: Path, change: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_guidance.trainer.checkpoints"):
        make_trainer(run, gpt2(), llama(), **SAVING, **change).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert f"Resuming from checkpoint-2 with other settings: {words}" in caplog.text


@pytest.mark.parametrize(("rows", "steps", "is_refused"), [(4, 4, True), (2, 4, False)])
def test_accumulated_samples_are_those_of_all_micro_batches(
    tmp_path: Path, rows: int, steps: int, is_refused: bool
) -> None:
    common = {**SAVING, "similarity_batch": "accumulated"}
    make_trainer(tmp_path, gpt2(), llama(), **common, gradient_accumulation_steps=2).train()
    options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    trainer = make_trainer(tmp_path, gpt2(), llama(), **{**common, **options})
    with pytest.raises(ValueError, match="gradient_accumulation_steps was 2, is 4") if is_refused else nullcontext():
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(("rows", "is_refused"), [(4, False), (8, True)])
def test_another_number_of_processes_is_said_and_refused_where_the_samples_change(
    run: Path, rows: int, is_refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    place = run / "checkpoint-2"
    origin = json.loads((place / "rng_state.json").read_text())
    shutil.copy(place / "rng_state.pth", place / "rng_state_0.pth")
    shutil.copy(place / "rng_state.pth", place / "rng_state_1.pth")
    then = origin | {"world_size": 2, "per_device_train_batch_size": rows}
    (place / "rng_state.json").write_text(json.dumps(then))
    trainer = make_trainer(run, gpt2(), llama(), **SAVING)
    if is_refused:
        with pytest.raises(ValueError, match="world_size was 2, is 1, per_device_train_batch_size was 8, is 4"):
            trainer.train(resume_from_checkpoint=str(place))
    else:
        trainer.train(resume_from_checkpoint=str(place))
        assert "world_size was 2, is 1. Data order" in caplog.text


@pytest.mark.parametrize(
    ("batch", "then", "words"),
    [
        ("global", {"world_size": 2}, r"world_size was 2, is 1\."),
        ("local", {"world_size": 2, "split_batches": True}, "world_size was 2, is 1, split_batches was True, is False"),
        ("local", {"world_size": 2}, None),
    ],
)
def test_a_similarity_over_other_rows_is_refused(
    run: Path, batch: str, then: dict[str, Any], words: str | None
) -> None:
    place = run / "checkpoint-2"
    origin = json.loads((place / "rng_state.json").read_text())
    (place / "rng_state.json").write_text(json.dumps(origin | then))
    trainer = make_trainer(run, gpt2(), llama(), **SAVING)
    config = replace(trainer.guidance, similarity_batch=batch)
    config.save(place, trainer.guide_identity)
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        check_goes_on(str(place), trainer.args, config, trainer.guide_identity)


def test_guidance_on_a_run_that_began_without_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(gpt2(), arguments(tmp_path, **SAVING), train_dataset=token_rows()).train()
    logs = trained(make_trainer(tmp_path, gpt2(), llama(), **SAVING), resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert "checkpoint-2 was trained without guidance; from here on there is guidance" in caplog.text
    assert "guidance/loss" in logs[1][-1]


def test_a_guided_run_that_goes_on_without_guidance_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(run, gpt2(), **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert "checkpoint-2 was trained with guidance; from here on there is none" in caplog.text


def test_another_length_is_refused_where_a_decay_ends_with_the_run(run: Path, tmp_path: Path) -> None:
    make_trainer(run, gpt2(), llama(), **SAVING, max_steps=4).train(resume_from_checkpoint=True)  # constant guidance
    decay = {**SAVING, "guidance_schedule": "cosine"}
    make_trainer(tmp_path, gpt2(), llama(), **decay).train()
    with pytest.raises(ValueError, match="max_steps was 3, is 6"):
        make_trainer(tmp_path, gpt2(), llama(), **decay, max_steps=6).train(resume_from_checkpoint=True)


def test_a_changed_guide_is_named_before_anything_is_written(run: Path) -> None:
    trainer = make_trainer(run, gpt2(), llama(seed=9), **SAVING, save_guide=True)
    with pytest.raises(ValueError, match="checkpoint-3 was guided by LlamaModel"):
        trainer.train(resume_from_checkpoint=True)
    assert not (run / "guide").exists()


def test_an_unguided_run_goes_on_from_its_last_whole_checkpoint_too(tmp_path: Path) -> None:
    expected = trained(make_trainer(tmp_path, gpt2(dropout=0.2), **SAVING))[0]
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    got = trained(make_trainer(tmp_path, gpt2(seed=5, dropout=0.2), **SAVING), resume_from_checkpoint=True)[0]
    assert same(got, expected)


# --------------------------------------------------------------------------------------- what the machine cannot do


def test_without_a_guide_weights_alone_are_resumed_from_as_plain_trainer_does(tmp_path: Path) -> None:
    found = []
    for kind in (Trainer, GuidanceTrainer):
        folder, shape = tmp_path / kind.__name__, {**SAVING, "save_only_model": True}
        for resume in (None, True):
            trainer = kind(gpt2(), arguments(folder, **shape), train_dataset=token_rows())
            if resume:
                shutil.rmtree(folder / "checkpoint-3")
            found.append(trained(trainer, resume_from_checkpoint=resume)[0])
    plain, plain_again, ours, ours_again = found
    assert same(ours, plain)
    assert same(ours_again, plain_again)
    (tmp_path / "GuidanceTrainer" / "checkpoint-2" / "model.safetensors").write_bytes(b"cut")
    assert last_complete_checkpoint(tmp_path / "GuidanceTrainer", weights_suffice=True).endswith("checkpoint-3")
    assert last_complete_checkpoint(tmp_path / "GuidanceTrainer") is None


def test_with_a_guide_weights_alone_do_not_suffice(tmp_path: Path) -> None:
    trained(make_trainer(tmp_path, gpt2(), llama(), **SAVING, save_only_model=True))
    with pytest.raises(ValueError, match=r"checkpoint-3: it has no optimizer state \(save_only_model\?\)"):
        make_trainer(tmp_path, gpt2(), llama(), **SAVING).train(resume_from_checkpoint=True)


def test_fp16_on_a_cpu_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = gpt2()
    seen = set()
    target.lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    make_trainer(tmp_path, target, llama(), fp16=True).train()
    assert "fp16 was asked for, but on the CPU Trainer runs float32" in caplog.text
    assert seen == {torch.float32}


def test_fsdp_on_a_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "FSDP was asked for, but this run is on the CPU, where Trainer would run plain DDP"
    args = arguments(tmp_path)
    args.fsdp = True
    with pytest.raises(ValueError, match=words):
        check_machine(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` does for fsdp2.yaml
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, gpt2(), llama())


def test_processes_that_would_each_train_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but this one trains in a world of 1.*use_cpu"):
        check_machine(args)


def test_reentrant_checkpointing_of_a_layer_inside_is_refused(tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(tmp_path, gpt2(), llama(), target_layers=["transformer.h.*.mlp"], **settings)
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.mlp' ran without gradients.*Set use_reentrant=False"):
        trainer.train()


def test_skipping_under_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), on_non_finite="skip")
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="on_non_finite='skip' does not work with DeepSpeed"):
        check_trainer(trainer)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (5, "split_batches gives each of the 2 processes its part of a batch, .* is 5: choose a multiple of 2"),
        (4, "per_device_train_batch_size is 4, split over 2 processes, but linear_cka needs at least 3 samples"),
        (6, None),
    ],
)
def test_batches_that_are_split_over_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, words: str | None
) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=rows, accelerator_config={"split_batches": True})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        check_settings(args, linear())
