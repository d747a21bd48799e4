"""One training of one network: its settings, which are saved so that runs are not mixed up, and its record."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_guidance.analysis.history import (
    debiased_curve,
    dimension_curves,
    gradient_curve,
    similarity_curves,
    training_curve,
    validation_curve,
)
from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.experiments.files import read_json
from hf_guidance.experiments.report import Record
from hf_guidance.trainer.environment import environment
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.similarity_film import SimilarityFilm
from hf_guidance.trainer.steps import TrainingClock

if TYPE_CHECKING:
    from hf_guidance.tasks import Task

SETTINGS = "settings.json"
NAMED = 6  # settings that differ, of a message
# TrainingArguments that do not change weights and curves, such as paths, logging and data loading
HARMLESS = re.compile(
    r"output_dir|run_name|seed|report_to|disable_tqdm|(log|logging|save|hub|push|ddp|trackio|_n_gpu).*|project"
    r"|dataloader_(?!drop_last).*"
    r"|do_(train|eval|predict)|load_best_model_at_end|remove_unused_columns|resume_from_checkpoint|ignore_data_skip"
    r"|local_rank|debug|skip_memory_metrics|torch_empty_cache_steps|eval_(delay|on_start|accumulation_steps|do_.*)|include_.*"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of one network.

    Args:
        name: Name of its folder and of its row in the table.
        seed: Seed of initial weights, data order and dropout.
        model: Builds the network; called right after seeding.
        guide: Builds the guide; None for a run without guidance.
        training: `TrainingArguments` fields that differ from those of the other runs.
        guidance: `GuidanceConfig` fields that differ.
        task: The task of this run, if its data differ from those of the comparison.
        needs: Name of the run, of the same seed, that trains the guide; None if no run does.
        like: Builds a guide with the same layers, to check settings before the run in `needs` is finished.
        trainer: Builds the trainer, without guide and guidance; None for a `GuidanceTrainer` with both.
    """

    name: str
    seed: int
    model: Callable[[], PreTrainedModel]
    guide: Callable[[], nn.Module] | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    guidance: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: Task | None = None
    needs: str | None = None
    like: Callable[[], nn.Module] | None = None
    trainer: Callable[..., Trainer] | None = None


def settings_of(
    model: nn.Module, args: TrainingArguments, guidance: GuidanceConfig | None, data: Mapping[str, Json]
) -> dict[str, Any]:
    """Return everything that the weights and curves of a run depend on, as JSON values.

    Args:
        model: The target. One without a config is known by its class and its number of parameters.
        args: Training arguments of the run.
        guidance: Guidance settings; None for a run without a guide.
        data: Description of the data.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        network = json.loads(config.to_json_string(use_diff=True))
        network.pop("transformers_version", None)
    else:
        network = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    training = {name: value for name, value in args.to_dict().items() if not HARMLESS.fullmatch(name)}
    training |= {"world_size": args.world_size}
    settings = training | {
        "guidance": guidance.without_paths() if guidance else None,
        "data": data,
        "network": network,
    }
    return json.loads(json.dumps(settings, default=str))


def check_same_settings(place: Path, now: Mapping[str, Json], unknown: Collection[str] = ()) -> None:
    """Raise ValueError if a folder holds a run with other settings, naming those that differ.

    Args:
        place: Folder of the run.
        now: Result of `settings_of`.
        unknown: Names of settings that are not compared.
    """
    if not (place / SETTINGS).is_file():
        return
    then = read_json(place / SETTINGS)
    if then.get("guidance"):  # settings that did not exist then had their defaults
        then["guidance"] = GuidanceConfig().to_dict() | then["guidance"]
    then, now = ({k: v for k, v in settings.items() if k not in unknown} for settings in (then, now))
    if not (changed := _changed(then, now)):
        return
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    other_version = then.keys() != now.keys()  # whose configs have other fields
    other = "another version of hf_guidance or transformers" if other_version else "other settings"
    raise ValueError(
        f"{place} holds a run with {other}: {', '.join(changed[:NAMED])}{more}. Give another output_dir. To "
        "run it again, remove that folder and those of runs that used its network as their guide."
    )


def _changed(then: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    """Return the settings that differ as `name was 1, is 2`; a setting in a group is named `group.name`."""
    words: list[str] = []
    for name in sorted(then.keys() | now.keys()):
        old, new = then.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            words += _changed({f"{name}.{k}": v for k, v in old.items()}, {f"{name}.{k}": v for k, v in new.items()})
        else:
            words.append(f"{name} was {reprlib.repr(old)}, is {reprlib.repr(new)}")
    return words


def first_rows(task: Task, size: int) -> dict[str, Any]:
    """Collate the first `size` validation rows of a task into a batch."""
    rows = (task.eval_dataset[i] for i in range(min(size, len(task.eval_dataset))))
    return dict(task.data_collator(list(rows)))


def record_of(
    run: Run, trainer: GuidedTrainer, settings: Mapping[str, Json], test: dict[str, float], metric: str
) -> Record:
    """Collect the record of a finished run as JSON values.

    Args:
        run: The run.
        trainer: Its trainer, after training.
        settings: Result of `settings_of`.
        test: Metrics of the test, with the prefix `test_`.
        metric: Name of the main metric.
    """
    clock = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, TrainingClock))
    seconds = {step: at for step, at in clock.marks}  # noqa: C416  JSON has made lists of the pairs
    history = trainer.state.log_history
    _, points = validation_curve(history, metric)
    curve = [point | {"seconds": seconds.get(point["step"])} for point in points]
    film = next((cb for cb in trainer.callback_handler.callbacks if isinstance(cb, SimilarityFilm)), None)
    frames: Record = {} if film is None else {"film": {str(step): found for step, found in film.frames.items()}}
    return frames | {
        "run": run.name,
        "seed": run.seed,
        "steps": trainer.state.global_step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "target": type(trainer.model).__name__,
        "guide": trainer.guide_identity if run.guide else None,
        "settings": dict(settings),
        "environment": environment(),
        "validation": curve[-1]["value"],
        "test": {k.removeprefix("test_"): v for k, v in test.items() if k.startswith("test_")},
        "curve": curve,
        "training": training_curve(history),
        "similarity": similarity_curves(history),
        "debiased": debiased_curve(history),
        "gradients": gradient_curve(history),
        "dimensions": dimension_curves(history),
        "seconds": clock.seconds,
        "steady_seconds": clock.steady_seconds(),
    }
