"""Matched runs: same seed, same initial weights, same data order, so that only the guidance differs.

Every run keeps its checkpoints and, when finished, its `result.json`. Rerunning the same command skips finished runs
and resumes the others.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments, set_seed

from hf_guidance.card.contents import RunFacts
from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.experiments.files import write_json
from hf_guidance.experiments.report import Record
from hf_guidance.experiments.run import Run, check_same_settings, first_rows, settings_of
from hf_guidance.experiments.run_training import RESULT, recorded, result_of, train_and_record
from hf_guidance.guide.sharding import built_whole
from hf_guidance.loss import GuidanceLoss
from hf_guidance.similarity.registry import min_samples
from hf_guidance.trainer.checks import check_settings
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer
from hf_guidance.trainer.layer_maps import LayerMaps, can_map
from hf_guidance.trainer.run_facts import run_facts
from hf_guidance.trainer.steps import TrainingClock
from hf_guidance.trainer.uploads import check_hub

if TYPE_CHECKING:
    from hf_guidance.tasks import Task

PREDICTIONS = "predictions.npz"
FEW = 8  # number of rows for checking settings


def check(run: Run, task: Task, args: TrainingArguments, guidance: GuidanceConfig, folder: Path) -> None:
    """Find whatever would make a guided run fail, before any training.

    Raises:
        ValueError: If settings, layers and data do not fit together.
        PermissionError, ConnectionError: If the run is to be pushed and the Hub refuses.
    """
    _check_guidance(run, task, args, guidance)
    place = run_folder(run, folder)
    own = _arguments(run, args, place)
    if own.push_to_hub and PartialState().is_main_process and not (place / RESULT).is_file():
        check_hub(own)


def check_folder(
    run: Run, args: TrainingArguments, guidance: GuidanceConfig, folder: Path, data: Mapping[str, Json], searched: bool
) -> None:
    """Find before any training whether the folder of a run holds one with other settings, or a record that is none.

    Args:
        run: The run. Its network is not compared here, but by `carry_out`, which builds it.
        args: Training arguments that all runs share.
        guidance: Guidance settings that all runs share.
        folder: Output folder of the recipe.
        data: Description of the data.
        searched: Whether the learning rate is still to be chosen.

    Raises:
        ValueError: If it does.
    """
    place, own = run_folder(run, folder), dataclasses.replace(guidance, **run.guidance).resolved()
    now = settings_of(torch.nn.Identity(), _arguments(run, args, place), own if run.guide else None, data)
    check_same_settings(place, now, ("network", *(["learning_rate"] if searched else [])))
    recorded(place)


def run_folder(run: Run, folder: Path) -> Path:
    """Return the folder of a run in the output folder of its recipe."""
    return folder / f"seed-{run.seed}" / run.name


def _check_guidance(run: Run, task: Task, args: TrainingArguments, guidance: GuidanceConfig) -> None:
    config = dataclasses.replace(guidance, **run.guidance).resolved()
    make = run.like if run.needs else run.guide
    if make is None or not config.guidance_weight:
        return
    if run.trainer is None:
        deepspeed = args.deepspeed is not None
        check_settings(args, config, deepspeed=deepspeed, sharded=deepspeed or bool(args.fsdp))
    set_seed(run.seed)
    config = config.alone()
    size = max(FEW, min_samples(config.measure))
    if config.guide_input == "shuffled":
        size = max(size, args.train_batch_size)  # of few rows none may have the length of another
    with built_whole():
        loss = GuidanceLoss(run.model(), make(), config, total_steps=1)
    with torch.no_grad(), loss.watch(first_rows(run.task or task, size), step=0) as watched:
        loss.target(**watched.inputs)
    loss.close()


def carry_out(
    run: Run,
    task: Task,
    args: TrainingArguments,
    guidance: GuidanceConfig,
    folder: Path,
    data: Mapping[str, Json],
    facts: RunFacts | None = None,
    callbacks: Callable[[Task], list[TrainerCallback]] = lambda task: [],
) -> Record:
    """Train, evaluate, test and save one run under `folder`, or read the result of an earlier call.

    Args:
        run: The run.
        task: Data, collator and metrics, unless the run has its own.
        args: Training arguments that all runs share.
        guidance: Guidance settings that all runs share.
        folder: Output folder of the recipe.
        data: Description of the data. A run that began with other data is not resumed.
        facts: Facts for the cards of guided runs.
        callbacks: Returns callbacks for the trainer, given the task.

    Returns:
        The content of its `result.json`: settings, final metrics, curves, similarities over time, training seconds.

    Raises:
        ValueError: If the folder holds a run with other settings, finished or not, or with another guide.
    """
    place = run_folder(run, folder)
    args = _arguments(run, args, place)
    guidance = dataclasses.replace(guidance, **run.guidance).resolved()
    set_seed(run.seed)
    model, task = run.model(), run.task or task
    if run.guide and guidance.cache_guide:
        guidance = dataclasses.replace(guidance, cache_guide=os.path.join(guidance.cache_guide, *place.parts[-2:]))
        task = dataclasses.replace(task, train_dataset=_numbered(task.train_dataset, str(guidance.sample_id_column)))
    settings = settings_of(model, args, guidance if run.guide else None, data)
    if (finished := result_of(run, place, settings)) is not None:
        return finished
    unguided = GuidanceConfig(guidance_weight=0.0, on_non_finite=guidance.on_non_finite)
    make = run.trainer or partial(
        GuidanceTrainer, guide=run.guide() if run.guide else None, guidance=guidance if run.guide else unguided
    )
    trainer: Any = make(
        model=model,
        args=args,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.data_collator,
        processing_class=task.processing_class,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        callbacks=[TrainingClock(), *callbacks(task)],
    )
    if run.guide:
        trainer.card_facts = {**(facts or {}), "target": {"untrained": True, "seed": run.seed}}
    test, maps = partial(_tested, task=task, place=place), partial(_maps, task=task)
    result = train_and_record(run, trainer, place, settings, task.metric, test, maps)
    if trainer.is_world_process_zero() and run.guide:
        result["card"] = run_facts(trainer, **trainer.card_facts)
        write_json(place / RESULT, result)
    trainer.accelerator.wait_for_everyone()
    return result


def _tested(trainer: Any, task: Task, place: Path) -> dict[str, float]:
    """Return the metrics on test data. Of classes the predictions are saved as predictions.npz."""
    if not task.labels:
        return trainer.evaluate(task.test_dataset, metric_key_prefix="test")
    found = trainer.predict(task.test_dataset, metric_key_prefix="test")
    if trainer.is_world_process_zero():
        best = found.predictions[:, 0]  # of the best classes, best first
        np.savez_compressed(place / PREDICTIONS, predictions=best, labels=found.label_ids)
    trainer.log(found.metrics)  # as `evaluate` does
    return found.metrics


def _maps(trainer: Any, task: Task) -> LayerMaps | None:
    """Prepare the layer maps, and compute the one of the untrained network on the first validation rows."""
    size = trainer.args.per_device_train_batch_size
    if not can_map(trainer) or min(size, len(task.eval_dataset)) < min_samples(trainer.guidance.measure):
        return None
    trainer.layer_maps = LayerMaps(first_rows(task, size))
    trainer.layer_maps.compute(trainer, "before")
    return trainer.layer_maps


def _numbered(rows: Any, column: str) -> Any:
    """Add a column of ids to the rows, which `cache_guide` needs."""
    if hasattr(rows, "with_ids"):
        return rows.with_ids(column)
    if not hasattr(rows, "add_column"):
        raise ValueError("cache_guide needs numbered rows, but these data are a stream: leave cache_guide out.")
    return rows.add_column(column, list(range(len(rows))))


def _arguments(run: Run, args: TrainingArguments, place: Path) -> TrainingArguments:
    args = copy.copy(args)
    args.output_dir, args.seed = str(place), run.seed
    args.run_name = f"{place.parent.parent.name}-{run.name}-seed{run.seed}"
    if args.push_to_hub:  # only the guided targets are published
        args.push_to_hub = run.guide is not None
        base = args.hub_model_id or place.parent.parent.name
        args.hub_model_id = f"{base}-{run.name.replace('_', '-')}-seed{run.seed}"
    for name, value in run.training.items():
        setattr(args, name, value)
    return args
