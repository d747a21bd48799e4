"""What is kept of a run: curves, similarities over time and in a map, seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_guidance.clock import TrainingClock
from hf_guidance.history import similarity_curves, training_curve, validation_curve
from hf_guidance.runtime import environment

if TYPE_CHECKING:
    from hf_guidance.comparison import Run
    from hf_guidance.tasks import Task


def first_rows(task: Task, size: int) -> dict[str, Any]:
    rows = (task.eval_dataset[i] for i in range(min(size, len(task.eval_dataset))))
    return dict(task.data_collator(list(rows)))


def record_of(run: Run, trainer: Any, settings: dict[str, Any], test: dict[str, float], metric: str) -> dict[str, Any]:
    clock = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, TrainingClock))
    seconds = {step: at for step, at in clock.marks}  # noqa: C416  JSON has made lists of the pairs
    history = trainer.state.log_history
    _, points = validation_curve(history, metric)
    curve = [point | {"seconds": seconds.get(point["step"])} for point in points]
    return {
        "run": run.name,
        "seed": run.seed,
        "steps": trainer.state.global_step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "target": type(trainer.model).__name__,
        "guide": trainer.guide_identity if run.guide else None,
        "settings": settings,
        "environment": environment(),
        "validation": curve[-1]["value"],
        "test": {k.removeprefix("test_"): v for k, v in test.items() if k.startswith("test_")},
        "curve": curve,
        "training": training_curve(history),
        "similarity": similarity_curves(history),
        "seconds": clock.seconds,
    }
