"""Guidance that stops at a similarity: when it is decided, on what, and that a stop of the run does not change it."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import gpt2, llama, token_rows
from launching import resumes_on_several_cpus, two_processes
from torch import Tensor
from trainers import make_trainer, same, train_logs, trained, weights
from transformers import TrainerState

from hf_guidance import GuidanceConfig, GuidanceTrainer
from hf_guidance.trainer.similarity_stop import DECIDE_EVERY, SimilarityStop, stop_among

SCRIPT = Path(__file__).parents[1] / "scripts" / "two_stops.py"
ARGS: Any = SimpleNamespace(device=torch.device("cpu"))
PAIRS = "guidance/similarity/"
RUN = {  # its similarity rises without a fall, as nearly every step sees the same eight rows
    "measure": "linear_cka",
    "log_measures": [],
    "max_steps": 65,
    "guidance_weight": 5.0,
    "train_dataset": token_rows(8),
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
}


def stopping(threshold: float, *steps: list[Tensor], state: TrainerState | None = None) -> SimilarityStop:
    """A callback after optimizer steps, each given as the similarities of all pairs at its one micro-step."""
    stop, state = SimilarityStop(threshold), state or TrainerState()
    for similarities in steps:
        stop.on_step_begin()
        stop.note(similarities)
        stop.take()
        state.global_step += 1
        stop.on_step_end(ARGS, state, None)
    return stop


def pairs(*values: float) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


def test_it_is_decided_every_twenty_steps_from_the_mean_over_pairs_and_steps(caplog: pytest.LogCaptureFixture) -> None:
    assert DECIDE_EVERY == 20
    low, high = pairs(0.2, 0.5), pairs(0.6, 0.9)  # of mean 0.35 and 0.75
    with caplog.at_level(logging.INFO, "hf_guidance"):
        assert stopping(0.5, *[high] * 19).stopped_at is None
        assert stopping(0.52, *[low] * 12, *[high] * 8, *[low] * 12, *[high] * 8).stopped_at is None  # 0.51
        assert caplog.text == ""
        assert stopping(0.52, *[low] * 20, *[low] * 10, *[high] * 10, *[low] * 20).stopped_at == 40
    words = "Guidance stops at step 40: the mean similarity is 0.5500, and guidance_stop_similarity is 0.52."
    assert [record.getMessage() for record in caplog.records] == [words]


def test_nothing_is_decided_over_steps_without_guidance_and_steps_left_out_do_not_count() -> None:
    assert stopping(0.5, *[[]] * 40).stopped_at is None
    stop, state = SimilarityStop(0.5), TrainerState()
    for step in range(20):
        stop.on_step_begin()
        stop.note(pairs(0.6 if step == 3 else float("nan")))
        if step == 3:
            stop.take()
        state.global_step += 1
        stop.on_step_end(ARGS, state, None)
    assert stop.stopped_at == 20


def test_every_micro_step_counts() -> None:
    stop = SimilarityStop(0.5)
    stop.on_step_begin()
    for value in (0.25, 0.5):
        stop.note(pairs(value))
    stop.take()
    stop.settle(ARGS.device)
    assert (stop.total, stop.count) == (0.75, 2)


# ------------------------------------------------------------------------------------------------------ in a trainer


def window_means(logs: list[dict[str, float]]) -> list[float]:
    """Mean similarity of every twenty steps, by the logs of every step."""
    means = [statistics.fmean(value for name, value in log.items() if name.startswith(PAIRS)) for log in logs]
    return [statistics.fmean(means[i : i + 20]) for i in range(0, len(means) - 19, 20)]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the mean similarities of steps 1–20, 21–40 and 41–60 of a run that guides to its end."""
    trainer = make_trainer(tmp_path_factory.mktemp("unstopped"), gpt2(), llama(), **RUN)
    means = window_means(trained(trainer)[1])
    assert means == sorted(means)
    assert means[1] - means[0] > 1e-3
    return means


def test_the_guide_rests_once_the_similarity_is_reached(
    tmp_path: Path, unstopped: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    guide, runs = llama(), []
    guide.register_forward_pre_hook(lambda *_: runs.append(trainer.state.global_step))
    threshold = (unstopped[0] + unstopped[1]) / 2
    trainer = make_trainer(tmp_path, gpt2(), guide, guidance_stop_similarity=threshold, **RUN | {"logging_steps": 7})
    logs = trained(trainer)[1]
    assert sorted(set(runs)) == list(range(40))
    assert [log["step"] for log in logs if "guidance/stopped_at_step" in log] == [42]
    assert logs[5]["guidance/stopped_at_step"] == 40
    assert [log["guidance/weight"] for log in logs[4:8]] == pytest.approx([5.0, 5.0 * 5 / 7, 0.0, 0.0])
    assert "guidance/loss" not in logs[6]
    assert trainer.guidance_loss.stopped_at == 40
    assert trainer._guided.total() == 40
    assert "should have been guided" not in caplog.text
    runs.clear()
    trainer.train()
    assert runs[0] == 0  # a new run is guided anew


def test_a_similarity_that_is_not_reached_changes_no_bit(tmp_path: Path) -> None:
    short = RUN | {"max_steps": 25}
    expected = trained(make_trainer(tmp_path, gpt2(dropout=0.2), llama(), **short))[0]
    stopping = make_trainer(tmp_path, gpt2(dropout=0.2), llama(), guidance_stop_similarity=1.0, **short)
    assert same(trained(stopping)[0], expected)


def between_halves(folder: Path, **settings: Any) -> float:
    """A threshold that steps 21–40 do not reach, and steps 31–40 do: without the sums of a checkpoint in between, a
    resumed run would stop too early.
    """
    logs = trained(make_trainer(folder, gpt2(), llama(), **settings))[1]
    of_steps = [[value for name, value in log.items() if name.startswith(PAIRS)] for log in logs]
    whole, half = (
        statistics.fmean(statistics.fmean(values) for values in of_steps[first:40] if values) for first in (20, 30)
    )
    assert half - whole > 1e-3
    return (whole + half) / 2


WAYS: dict[str, dict[str, Any]] = {
    "every step": {},
    "micro-steps": {"gradient_accumulation_steps": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "similarity_batch": "accumulated"},
    "every third step": {"guidance_every": 3, "learning_rate": 1e-3},  # else it falls again at other versions
    "pre-alignment": {"prealign_steps": 30},
    "callbacks restored by Trainer": {"restore_callback_states_from_checkpoint": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumed_between_two_decisions_stops_at_the_same_step(tmp_path: Path, way: str) -> None:
    settings = {**RUN, "train_dataset": token_rows(16), **WAYS[way]}
    threshold = between_halves(tmp_path, **settings)
    settings |= {"guidance_stop_similarity": threshold, "save_strategy": "steps", "save_steps": 15}
    unbroken = make_trainer(tmp_path / "run", gpt2(), llama(), **settings)
    expected = trained(unbroken)[0]
    stopped_at = unbroken.guidance_loss.stopped_at
    assert stopped_at == 60
    resumed = make_trainer(tmp_path / "run", gpt2(seed=5), llama(), **settings)
    got = trained(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-30"))[0]
    assert resumed.guidance_loss.stopped_at == stopped_at
    assert same(got, expected)


def test_a_checkpoint_holds_the_sums_since_the_last_decision(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 15, "max_steps": 30}
    trainer = make_trainer(tmp_path, gpt2(), llama(), guidance_stop_similarity=1.0, **RUN | saving)
    logs = trained(trainer)[1]
    state = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["SimilarityStop"]
    means = [statistics.fmean(value for name, value in log.items() if name.startswith(PAIRS)) for log in logs[20:30]]
    assert saved["args"] == {"threshold": 1.0}
    assert saved["attributes"] == {
        "stopped_at": None,
        "is_logged": False,
        "total": pytest.approx(sum(means), rel=1e-6),
        "count": 10,
    }


def test_a_run_resumed_after_guidance_stopped_stays_without_and_still_logs_when(tmp_path: Path) -> None:
    settings = RUN | {"save_strategy": "steps", "save_steps": 25, "logging_steps": 30, "guidance_stop_similarity": 1e-3}
    make_trainer(tmp_path, gpt2(), llama(), **settings).train()
    guide, runs = llama(), []
    guide.register_forward_pre_hook(lambda *_: runs.append(1))
    trainer = make_trainer(tmp_path, gpt2(), guide, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-25"))
    assert not runs
    assert [log.get("guidance/stopped_at_step") for log in train_logs(trainer)] == [20, None]
    assert trainer.guidance_loss.stopped_at == 20


def test_steps_that_are_left_out_do_not_enter_the_mean(tmp_path: Path) -> None:
    guide = llama()
    guide.layers[1].register_forward_hook(
        lambda module, args, output: output * (float("nan") if trainer.state.global_step == 5 else 1)
    )
    settings = RUN | {"max_steps": 25, "on_non_finite": "skip", "guidance_stop_similarity": 1e-3}
    trainer = make_trainer(tmp_path, gpt2(), guide, **settings)
    logs = trained(trainer)[1]
    assert [log["step"] for log in logs if "guidance/skipped_steps" in log] == [6]
    assert trainer.guidance_loss.stopped_at == 20


def test_the_mean_is_unweighted_though_the_pairs_are_weighted(tmp_path: Path) -> None:
    names = ["hidden_states.1~hidden_states.1@0", "hidden_states.2~hidden_states.3@2"]
    settings = RUN | {"max_steps": 21, "layer_pairs": names}
    logs = trained(make_trainer(tmp_path, gpt2(), llama(), **settings))[1]
    (mean,) = window_means(logs)
    for threshold, stopped_at in ((mean - 1e-4, 20), (mean + 1e-4, None)):
        trainer = make_trainer(tmp_path, gpt2(), llama(), guidance_stop_similarity=threshold, **settings)
        trainer.train()
        assert trainer.guidance_loss.stopped_at == stopped_at


def test_without_a_threshold_or_a_guide_nothing_decides(tmp_path: Path) -> None:
    assert stop_among(make_trainer(tmp_path, gpt2(), llama()).callback_handler.callbacks) is None
    none = GuidanceConfig(guidance_weight=0.0, guidance_stop_similarity=0.5)
    plain = make_trainer(tmp_path, gpt2())
    trainer = GuidanceTrainer(gpt2(), plain.args, train_dataset=plain.train_dataset, guidance=none)
    assert stop_among(trainer.callback_handler.callbacks) is None
    trainer.train()
    assert weights(trainer.model)


# ------------------------------------------------------------------------------------------------- on two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank wrote."""
    return [torch.load(file) for file in two_processes(SCRIPT, tmp_path_factory.mktemp("two_stops"))]


@resumes_on_several_cpus
@pytest.mark.parametrize("batch", ["local", "global"])
def test_two_processes_stop_together_resumed_or_not(ranks: list[dict[str, Any]], batch: str) -> None:
    first, second = (rank[batch] for rank in ranks)
    assert first["threshold"] == second["threshold"]
    assert (first["saw"] == second["saw"]) == (batch == "global")  # each rank has rows of its own
    joint = [(a + b) / 2 for a, b in zip(first["saw"], second["saw"], strict=True)]
    reached = [statistics.fmean(joint[i - 20 : i]) >= first["threshold"] for i in (20, 40, 60)]
    assert reached == [False, False, True]
    for rank in (first, second):
        assert (rank["unbroken"]["stopped at"], rank["resumed"]["stopped at"]) == (60, 60)
        assert same(rank["resumed"]["weights"], rank["unbroken"]["weights"])
        assert rank["saved"]["count"] == 20  # of two ranks in steps 21 to 30
        assert rank["saved"]["total"] == pytest.approx(2 * sum(joint[20:30]), rel=1e-5)
    assert same(first["unbroken"]["weights"], second["unbroken"]["weights"])


def test_micro_batches_of_more_rows_weigh_more() -> None:
    stop, state = SimilarityStop(0.62), TrainerState()
    for _ in range(20):  # a weighted mean of 0.65, and 0.55 without weights
        stop.on_step_begin()
        stop.note(pairs(0.75), 3)
        stop.note(pairs(0.35), 1)
        stop.take()
        state.global_step += 1
        stop.on_step_end(ARGS, state, None)
    assert stop.stopped_at == 20


def test_a_run_that_is_too_short_for_a_decision_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for steps, said in ((19, 1), (20, 0)):
        caplog.clear()
        state = TrainerState()
        state.max_steps, state.stateful_callbacks = steps, {}
        SimilarityStop(0.5).on_train_begin(ARGS, state)
        assert len(caplog.records) == said


def test_a_stop_that_is_added_by_hand_stops_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), **RUN | {"max_steps": 25}, callbacks=[SimilarityStop(0.1)])
    trainer.train()
    assert [log["guidance/stopped_at_step"] for log in train_logs(trainer) if "guidance/stopped_at_step" in log] == [20]


def test_guidance_goes_on_once_the_stop_is_removed(tmp_path: Path) -> None:
    stop = SimilarityStop(0.1)
    trainer = make_trainer(tmp_path, gpt2(), llama(), **RUN | {"max_steps": 25, "logging_steps": 1}, callbacks=[stop])
    trainer.train()
    assert train_logs(trainer)[-1]["guidance/weight"] == 0
    trainer.remove_callback(stop)
    trainer.train()
    assert train_logs(trainer)[-1]["guidance/weight"] == RUN["guidance_weight"]
    trainer.guidance_loss.stopped_at = 3  # by hand it stays
    trainer.train()
    assert train_logs(trainer)[-1]["guidance/weight"] == 0
