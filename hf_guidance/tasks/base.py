"""What a task is: everything a Trainer needs besides the model and its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import EvalPrediction

IGNORED_LABEL = -100  # transformers' mark of a position without a label, and what it pads labels with


@dataclass(frozen=True)
class Task:
    """Data, collator, tokenizer and metrics of one task, each under the name that `Trainer` gives it.

    Args:
        name: The task's name in `TASKS`.
        description: One sentence on what is learnt.
        train_dataset: Rows to train on, of any kind `Trainer` takes; a stream where the data are streamed.
        eval_dataset: Rows to choose settings by.
        test_dataset: Rows to report once.
        data_collator: Makes a batch of rows.
        processing_class: The tokenizer, whose length is the vocabulary size, or the image processor.
        compute_metrics: From predictions, as `preprocess_logits_for_metrics` leaves them, and labels to metrics.
        preprocess_logits_for_metrics: Reduces a batch's logits to what the metrics need, so that an evaluation does
            not hold every logit; `None` if they need every logit.
        metric: Name of the main metric, without the `eval_` that `Trainer` puts in front.
        higher_is_better: Whether more of it is better.
        percent: Whether it is a fraction, to be shown in percent.
        labels: Names of the classes, where there are classes.
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


def main_logits(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The logits among a model's outputs, which `Trainer` hands on as a tuple when there are several."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def argmax_predictions(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Each position's best class, for metrics that need no more: `(batch, ..., classes)` to `(batch, ...)`."""
    return main_logits(outputs).argmax(-1)
