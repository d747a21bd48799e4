"""The time that training steps take: CPU time or GPU time, measured without making either wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

Moment: TypeAlias = float | torch.Event

MAX_EVENTS = 1000  # steps whose events are kept before they are read, which waits for the device
WARM_UP = 5  # first steps of a process, which allocate, compile and fill caches


class Clock:
    """A clock that reads the CPU time of this process, or on a GPU the time between CUDA events.

    CPU time does not count what other processes do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Moment:
        """Return a point in time; on a GPU, after all work that was queued so far."""
        if self.device.type == "cpu":
            return time.process_time()
        event = torch.Event(self.device.type, enable_timing=True)
        event.record()
        return event

    def between(self, began: Moment, ended: Moment) -> float:
        """Return the seconds between two points, after waiting for the device to reach the second."""
        if isinstance(began, float):
            assert isinstance(ended, float)
            return ended - began
        assert not isinstance(ended, float)
        ended.synchronize()
        return began.elapsed_time(ended) / 1000


class TrainingClock(TrainerCallback, ExportableState):
    """A callback that adds up the time of training steps, without evaluation, saving and data loading.

    The time is saved in checkpoints and survives a resume.

    Attributes:
        steps: Number of steps.
        seconds: Time of all steps up to the last evaluation, save or end of training, in seconds.
        marks: `(step, seconds so far)` at every evaluation.
        cold: Number of the steps that were the first ones of a process, and their seconds.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.marks: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.cold: tuple[int, float] = (0, 0.0)
        self._warms_up = WARM_UP  # steps of this process that still count as cold
        self._events: list[tuple[tuple[Moment, Moment], ...]] = []  # of steps not yet in `seconds`, each before pauses
        self._pauses: list[tuple[Moment, Moment]] = []
        self._clock = Clock(torch.device("cpu"))
        self._is_in_step = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._clock, self._warms_up = Clock(args.device), WARM_UP
        # Trainer restores callbacks only with restore_callback_states_from_checkpoint, and saves those its state knows
        callbacks: Any = state.stateful_callbacks  # annotated as a list, and is a dict
        saved = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            kept = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
            self.seconds, self.marks = kept["seconds"], [(step, at) for step, at in kept["marks"]]
            self.steps = kept.get("steps", state.global_step)
            self.cold = tuple(kept.get("cold", self.cold))

    def on_step_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._began, self._is_in_step = self._clock.now(), True

    def on_step_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._events.append(((self._began, self._clock.now()), *self._pauses))
        self._pauses, self._is_in_step = [], False
        self.steps += 1
        if len(self._events) >= MAX_EVENTS:
            self._settle()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside this context out, if it is part of a step."""
        began, counts = self._clock.now(), self._is_in_step
        try:
            yield
        finally:
            if counts:
                self._pauses.append((began, self._clock.now()))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._settle()
        self.marks.append((state.global_step, self.seconds))

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self._settle()

    def steady_seconds(self) -> float:
        """Return the time that all steps would take without warming up: the cold ones count as the mean of the others.

        With fewer than five others, or as many as there are cold ones, it is the time that was measured.
        """
        self._settle()
        count, seconds = self.cold
        others = self.steps - count
        if others < max(WARM_UP, count):
            return self.seconds
        return (self.seconds - seconds) * self.steps / others

    def state(self) -> dict[str, Any]:
        self._settle()
        kept = {"seconds": self.seconds, "marks": self.marks, "steps": self.steps, "cold": self.cold}
        return {"args": {}, "attributes": kept}

    def _settle(self) -> None:
        for step, *pauses in self._events:
            spent = self._clock.between(*step) - sum(self._clock.between(*pause) for pause in pauses)
            self.seconds += spent
            if self._warms_up:
                self.cold, self._warms_up = (self.cold[0] + 1, self.cold[1] + spent), self._warms_up - 1
        self._events = []
