"""The parts of a task: everything that a Trainer needs besides the model and its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import EvalPrediction

IGNORED_LABEL = -100  # transformers marks positions without a label, and pads labels, with it


@dataclass(frozen=True)
class Task:
    """Data, collator, tokenizer and metrics of one task, each under the name that `Trainer` uses.

    Args:
        name: The task's name in `TASKS`.
        description: One sentence on what the task is.
        train_dataset: Training rows, in any form that `Trainer` takes; a stream if the data are streamed.
        eval_dataset: Validation rows, for choosing settings.
        test_dataset: Test rows, for reporting once.
        data_collator: Collates rows into a batch.
        processing_class: The tokenizer, whose length is the vocabulary size, or the image processor.
        compute_metrics: Computes metrics from labels and the predictions that `preprocess_logits_for_metrics` returns.
        preprocess_logits_for_metrics: Reduces the logits of a batch to what the metrics need, so that evaluation does
            not store every logit; `None` if the metrics need every logit.
        metric: Name of the main metric, without the prefix `eval_`.
        higher_is_better: Whether a higher value of the metric is better.
        percent: Whether the metric is a fraction that is shown in percent.
        labels: Names of the classes, if there are classes.
        chance: Value of the metric by guessing, if that is known.
    """

    name: str
    description: str
    train_dataset: Any
    eval_dataset: Any
    test_dataset: Any
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    processing_class: Any
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    preprocess_logits_for_metrics: Callable[[Any, Tensor], Tensor] | None
    metric: str
    higher_is_better: bool
    percent: bool = True
    labels: tuple[str, ...] = ()
    chance: float | None = None


def main_logits(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the logits among the outputs of a model, which `Trainer` passes as a tuple if there are several."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def argmax_predictions(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the best class at each position: `(batch, ..., classes)` to `(batch, ...)`."""
    return main_logits(outputs).argmax(-1)
