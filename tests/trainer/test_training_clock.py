"""Time of training steps, across stops, on a CPU and on what computes while the processor goes on."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import gpt2, llama, token_rows
from torch import nn
from trainers import make_trainer
from transformers import TrainerState, default_data_collator

from hf_guidance.trainer import steps as module
from hf_guidance.trainer.steps import Clock, TrainingClock


def test_the_time_of_a_run_that_was_stopped_is_that_of_all_its_parts(tmp_path: Path) -> None:
    def part(checkpoint: str | None = None) -> TrainingClock:
        clock = TrainingClock()
        settings = {
            "save_steps": 2,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "max_steps": 4,
        }
        trainer = make_trainer(tmp_path, gpt2(), eval_dataset=token_rows(), callbacks=[clock], **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return clock

    first = part()
    second = part(str(tmp_path / "checkpoint-2"))
    assert [step for step, _ in second.marks] == [2, 4]
    assert second.marks[0] == first.marks[0]
    assert second.marks[0][1] < second.marks[1][1] == second.seconds
    assert (first.steps, second.steps) == (4, 4)


def test_what_is_paused_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(process_time=lambda: now[0]))
    own, args = TrainingClock(), SimpleNamespace(device=torch.device("cpu"))
    own.on_step_begin(args)  # type: ignore[arg-type]
    now[0] += 2
    with own.paused():
        now[0] += 100
    now[0] += 3
    own.on_step_end(args)  # type: ignore[arg-type]
    with own.paused():  # outside of a step, where nothing is counted anyway
        now[0] += 100
    assert own.state()["attributes"]["seconds"] == 5


def test_the_first_steps_of_each_process_count_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(process_time=lambda: now[0]))
    args = SimpleNamespace(device=torch.device("cpu"))

    def steps(own: TrainingClock, times: list[float]) -> None:
        for time_of_step in times:
            own.on_step_begin(args)  # type: ignore[arg-type]
            now[0] += time_of_step
            with own.paused():
                now[0] += 50
            own.on_step_end(args)  # type: ignore[arg-type]

    first = TrainingClock()
    first.on_train_begin(args, TrainerState())  # type: ignore[arg-type]
    steps(first, [9, 3, 1, 1, 1, 1, 1, 1, 1])
    assert (first.steady_seconds(), first.seconds) == (19, 19), "too few others"
    steps(first, [1])
    assert (first.steady_seconds(), first.seconds, first.cold) == (10, 20, (5, 15))
    second = TrainingClock()
    state = TrainerState(global_step=10, stateful_callbacks={"TrainingClock": first.state()})  # type: ignore[arg-type]
    second.on_train_begin(args, state)  # type: ignore[arg-type]
    steps(second, [7, 1, 1, 1, 1, *10 * [1]])
    assert (second.steady_seconds(), second.seconds, second.cold) == (25, 41, (10, 26))


def test_steps_are_timed_and_evaluation_and_fetching_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(process_time=lambda: now[0]))

    def collate(rows: list[Any]) -> Any:
        now[0] += 1e4
        return default_data_collator(rows)

    def forward(module: nn.Module, _: Any) -> None:
        now[0] += 2 if module.training else 1e4

    target = gpt2()
    target.register_forward_pre_hook(forward)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "data_collator": collate}
    trainer = make_trainer(tmp_path, target, llama(), eval_dataset=token_rows(4), **settings)
    trainer.train()
    own = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, TrainingClock))
    assert own.marks == [(1, 2.0), (2, 4.0), (3, 6.0)]
    trainer.create_model_card()
    assert re.search(r"^\| a step with guidance +\| 2 s of CPU time +\|$", (tmp_path / "README.md").read_text(), re.M)


def test_on_a_device_the_time_is_that_between_events_and_no_step_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    class Event:
        """One of a device that takes three milliseconds for whatever it is given."""

        count = 0

        def __init__(self, device: str, enable_timing: bool) -> None:
            assert (device, enable_timing) == ("cuda", True)

        def record(self) -> None:
            Event.count += 1
            self.at = 3.0 * Event.count

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(module, "MAX_EVENTS", 4)
    own, args, state = TrainingClock(), SimpleNamespace(device=torch.device("cuda")), TrainerState()
    own.on_train_begin(args, state)
    for _ in range(3):
        own.on_step_begin(args)
        own.on_step_end(args)
    assert (waited, own.seconds) == ([], 0.0)
    own.on_evaluate(args, TrainerState(global_step=3))
    assert own.marks == [(3, pytest.approx(0.009))]
    for _ in range(4):  # so many that they are read at once
        own.on_step_begin(args)
        own.on_step_end(args)
    assert (own.seconds, own.steps, len(waited)) == (pytest.approx(0.021), 7, 7)


def test_the_clock_of_a_cpu_is_that_of_its_work_and_not_of_waiting() -> None:
    clock = Clock(torch.device("cpu"))
    began = clock.now()
    time.sleep(0.2)
    assert clock.between(began, clock.now()) < 0.1
