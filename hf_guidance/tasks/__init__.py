"""Tasks: data, collator, tokenizer and metrics, ready for a Trainer.

`datasets` and `evaluate` are imported only when a task is built, so this package imports without them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from .base import IGNORED_LABEL, Task
from .copy_paste import copy_paste
from .images import image_classification
from .parity import limit_length, parity
from .text import language_modeling

__all__ = [
    "IGNORED_LABEL",
    "TASKS",
    "Task",
    "build_task",
    "copy_paste",
    "image_classification",
    "language_modeling",
    "limit_length",
    "parity",
]

TASKS: dict[str, Callable[..., Task]] = {
    "copy_paste": copy_paste,
    "parity": parity,
    "language_modeling": language_modeling,
    "image_classification": image_classification,
}


def build_task(name: str, **options: Any) -> Task:
    """Build the task with the given name.

    Args:
        name: One of `TASKS`.
        options: Arguments of the function that builds it.

    Raises:
        ValueError: If there is no such task, or the task has no such option.

    Example:
        >>> task = build_task("parity", max_length=20, train_size=1000, eval_size=100, test_size=100)
        >>> len(task.processing_class), len(task.eval_dataset)
        (3, 100)
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}{hint}")
    possible = inspect.signature(TASKS[name]).parameters
    unknown = [option for option in options if option not in possible]
    if unknown:
        raise ValueError(f"task {name!r} has no option {', '.join(unknown)}; it has {', '.join(possible)}")
    return TASKS[name](**options)
