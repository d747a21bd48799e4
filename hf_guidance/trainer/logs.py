"""Logs of a guided run, and the shorter form of them that is printed."""

from __future__ import annotations

import copy
import sys
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hf_guidance.trainer.protocol import GuidedTrainer


class RunningMeans:
    """Means of logged values, kept on the device between two logs so that no step waits for them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything since the last log."""
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Add a scalar with a weight. With weight 0, the logged value is a plain sum."""
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def take(self, other: RunningMeans) -> None:
        """Add the sums of another object."""
        for name, value in other._sums.items():
            self.add(name, value, other._weights[name])

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over micro-steps and ranks since the last call, and reset them.

        Names that were added with weight 0 are plain sums.
        """
        sums = [torch.as_tensor(value, device=accelerator.device).float() for value in self._sums.values()]
        values = torch.stack(sums) if sums else torch.empty(0)
        mine = dict(zip(self._sums, zip(values.tolist(), self._weights.values(), strict=True), strict=True))
        totals: dict[str, tuple[float, float]] = {}
        for rank in gather_object([mine]):  # ranks that skipped different batches hold different names
            for name, (value, weight) in rank.items():
                total, weights = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, weights + weight
        self.clear()
        return {name: value / weight if weight else value for name, (value, weight) in sorted(totals.items())}


class _Short:
    """A mixin for callbacks that leaves out the similarities of single pairs."""

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        given = logs or {}  # another Trainer may have names with as many slashes
        short = {name: value for name, value in given.items() if "guidance/" not in name or name.count("/") < 2}
        super().on_log(*args, logs=short, **kwargs)  # type: ignore[misc]


class ShortProgressCallback(_Short, ProgressCallback):
    """Trainer's progress bar without the similarities of single pairs."""


class ShortPrinterCallback(_Short, PrinterCallback):
    """Trainer's printed logs, used without a progress bar, without the similarities of single pairs."""


class _TaskLoss:
    """A mixin for the table in a notebook: the task's training loss, as the validation loss is the task's."""

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().on_log(*args, logs=_of_task(logs or {}), **kwargs)  # type: ignore[misc]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        seen = copy.copy(state)
        seen.log_history = [_of_task(log) for log in state.log_history]
        short = {name: value for name, value in (metrics or {}).items() if "guidance/" not in name}
        super().on_evaluate(args, seen, control, metrics=short, **kwargs)  # type: ignore[misc]


def _of_task(logs: dict[str, float]) -> dict[str, float]:
    return {**logs, "loss": logs["task/loss"]} if "task/loss" in logs and "loss" in logs else logs


def short_form_of(callback: TrainerCallback) -> TrainerCallback | None:
    """Return what shows a Trainer's progress instead of its own callback; None for any other callback.

    Args:
        callback: A callback of a Trainer.
    """
    kind = type(callback)
    notebook = sys.modules.get("transformers.utils.notebook")  # imported in a notebook alone, as it needs IPython
    if notebook is not None and kind is notebook.NotebookProgressCallback:
        return _in_notebook(kind)()
    return {ProgressCallback: ShortProgressCallback, PrinterCallback: ShortPrinterCallback}.get(kind, lambda: None)()


@cache
def _in_notebook(kind: type[TrainerCallback]) -> type[TrainerCallback]:
    class TaskLossNotebookCallback(_TaskLoss, kind):  # type: ignore[misc, valid-type]
        """Trainer's table in a notebook, with the task's losses and without similarities."""

    return TaskLossNotebookCallback


def is_last_before_log(trainer: GuidedTrainer, step: int) -> bool:
    """Tell whether a step is the last guided one before a log, so that values only logged are computed just then."""
    args, state = trainer.args, trainer.state
    if args.logging_strategy != IntervalStrategy.STEPS or (args.logging_first_step and step == 0):
        return True
    every = max(1, state.logging_steps)
    logged = (step // every + 1) * every - 1  # the next step that is logged
    return step + trainer.guidance.guidance_every > logged
