"""What is kept of a run: curves, similarities over time and in a map, seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_guidance.analysis.heat_maps import similarity_map
from hf_guidance.config import GuidanceConfig
from hf_guidance.history import similarity_curves, training_curve, validation_curve
from hf_guidance.runtime import environment
from hf_guidance.similarity import get_measure
from hf_guidance.trainer import GuidanceTrainer

if TYPE_CHECKING:
    from hf_guidance.comparison import Run
    from hf_guidance.tasks import Task


class TrainingClock(TrainerCallback, ExportableState):
    """Time spent in training steps, evaluation and saving left out: of the processor on a CPU, else of the clock.

    Survives a resume with the checkpoint's other state.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.marks: list[tuple[int, float]] = []  # (step, seconds) at every evaluation
        self._began = 0.0

    def on_train_begin(self, args: TrainingArguments, state: Any, *_: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:  # Trainer restores callbacks only where it is asked to restore all of them
            attributes = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
            self.seconds, self.marks = attributes["seconds"], [(step, at) for step, at in attributes["marks"]]

    def on_step_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._began = _now(args)

    def on_step_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self.seconds += _now(args) - self._began

    def on_evaluate(self, args: TrainingArguments, state: Any, *_: Any, **kwargs: Any) -> None:
        self.marks.append((state.global_step, self.seconds))

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds, "marks": self.marks}}


def _now(args: TrainingArguments) -> float:
    if args.device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def first_rows(task: Task, size: int) -> dict[str, Any]:
    rows = (task.eval_dataset[i] for i in range(min(size, len(task.eval_dataset))))
    return dict(task.data_collator(list(rows)))


def similarity_map_of(trainer: GuidanceTrainer, guidance: GuidanceConfig, task: Task) -> dict[str, Any] | None:
    """Similarities of all layers on the first validation rows; None where one process does not hold the target."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or not guidance.guidance_weight:
        return None
    batch = trainer._prepare_inputs(first_rows(task, trainer.args.per_device_train_batch_size))
    if len(next(iter(batch.values()))) < get_measure(guidance.measure).min_samples:
        return None
    target = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).to(trainer.args.device)
    return similarity_map(target, trainer.guide, guidance, batch, autocast=trainer.accelerator.autocast())


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
