"""What training steps take: processor time on a CPU, device time on a GPU, without making either wait."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

Moment: TypeAlias = float | torch.Event

MANY = 1000  # steps whose events are kept before they are read


class Clock:
    """Processor time of this process on a CPU, whatever else the machine does; device time between events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Moment:
        """A point in time, at the end of what the device has been given to do so far."""
        if self.device.type == "cpu":
            return time.process_time()
        event = torch.Event(self.device.type, enable_timing=True)
        event.record()
        return event

    def between(self, began: Moment, ended: Moment) -> float:
        """Seconds between two points; waits for the device to get there."""
        if isinstance(began, float):
            assert isinstance(ended, float)
            return ended - began
        assert not isinstance(ended, float)
        ended.synchronize()
        return began.elapsed_time(ended) / 1000


class TrainingClock(TrainerCallback, ExportableState):
    """Time spent in training steps, evaluation, saving and the fetching of batches left out.

    Survives a resume with the checkpoint's other state.

    Attributes:
        steps: how many there were.
        seconds: of all steps up to the last evaluation, save or end.
        marks: ``(step, seconds so far)`` at every evaluation.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.marks: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._events: list[tuple[Moment, Moment]] = []  # of steps that are not in the seconds yet
        self._clock = Clock(torch.device("cpu"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._clock = Clock(args.device)
        # Trainer restores callbacks only where it is asked to restore all, and saves only those its state knows
        callbacks: Any = state.stateful_callbacks  # annotated as a list, and is a dict
        saved = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            kept = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
            self.seconds, self.marks = kept["seconds"], [(step, at) for step, at in kept["marks"]]
            self.steps = kept.get("steps", state.global_step)

    def on_step_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._began = self._clock.now()

    def on_step_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._events.append((self._began, self._clock.now()))
        self.steps += 1
        if len(self._events) >= MANY:
            self._settle()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._settle()
        self.marks.append((state.global_step, self.seconds))

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self._settle()

    def state(self) -> dict[str, Any]:
        self._settle()
        return {"args": {}, "attributes": {"seconds": self.seconds, "marks": self.marks, "steps": self.steps}}

    def _settle(self) -> None:
        self.seconds += sum(self._clock.between(*pair) for pair in self._events)  # waits for the device
        self._events = []
