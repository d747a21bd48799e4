"""Displays of a run's logs: Trainer's own callbacks, without the similarities of single pairs."""

from __future__ import annotations

import copy
import sys
from functools import cache
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback


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
