"""Facts about a run for its model card, gathered from the trainer."""

from __future__ import annotations

import csv
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_guidance.analysis.history import History, debiased_curves, metrics_of, similarity_curves
from hf_guidance.card.command import published_command
from hf_guidance.card.contents import RunFacts
from hf_guidance.card.facts import HUB_ID, Facts, example_of, known, processing_facts, rows_facts
from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.trainer.environment import command_line, environment
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.similarity_stop import stop_among
from hf_guidance.trainer.steps import TrainingClock

VERSIONS = ("python", "torch", "transformers", "accelerate")
SIZES = (
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "hidden_sizes",
    "depths",
    "vocab_size",
    "image_size",
)
EMISSIONS = "emissions.csv"  # written by codecarbon


def run_facts(trainer: GuidedTrainer, **given: Any) -> RunFacts:
    """Gather the facts of a trainer's run as plain JSON values, for `render`.

    Args:
        trainer: A `GuidanceTrainer` that has trained.
        **given: Facts that the trainer cannot know, such as license, language, tags or comparison. They replace those
            of the trainer; those in `target` and `data` are merged.
    """
    guided = trainer.guide is not None and trainer.guidance.guidance_weight > 0
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    repository = trainer.hub_model_id if trainer.args.push_to_hub or trainer.hub_model_id else None
    args, history = trainer.args, trainer.state.log_history
    facts: Facts = {
        "name": (repository or os.path.basename(os.path.abspath(str(args.output_dir)))).split("/")[-1],
        "repository": repository,
        "target": _target(model),
        "guide": _guide(trainer) if guided else None,
        "guidance": trainer.guidance.without_paths() if guided else None,
        "stopped_at": stopped_at(trainer) if guided else None,
        "pairs": pairs_facts(similarity_curves(history), debiased_curves(history)) if guided else None,
        "results": _results(history, best_step(trainer)),
        "training": training_facts(
            args.to_dict() | {"world_size": args.world_size}, trainer.state.global_step, args.seed
        ),
        "cost": _cost(trainer),
        "emissions": _emissions(trainer),
        "dashboard": _dashboard(args),
        "data": rows_facts(trainer.train_dataset) | processing_facts(trainer.processing_class),
        "example": example_of(trainer.processing_class),
        **({} if "command" in given else command_facts(command_line(), TrainingArguments, GuidanceConfig)),
        "versions": {k: v for k, v in environment().items() if k in VERSIONS},
    }
    for name in ("target", "data"):
        own = given.pop(name, None) or {}
        facts[name] = own | facts[name] | own  # the data's name comes first, and what was given replaces the rest
    found: Any = known(facts | known(given))
    return found


def given_facts(
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    dataset: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    finetuned_from: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Convert the arguments of `Trainer.create_model_card` to facts."""
    first = dataset_tags if isinstance(dataset_tags, str) or not dataset_tags else dataset_tags[0]
    name = dataset if isinstance(dataset, str) or not dataset else ", ".join(dataset)
    return {
        "language": language,
        "license": license,
        "name": model_name,
        "tags": [tags] if isinstance(tags, str) else list(tags or ()),
        "data": {key: value for key, value in {"name": name or first, "id": first}.items() if value},
        "target": {"source": finetuned_from} if finetuned_from else {},
    }


def command_facts(words: list[str] | None, *parsers: type) -> Facts:
    """Return the command that started a run, as far as it may be published, and whether parts were left out."""
    command, cut = published_command(words, parsers) if words else ("", False)
    return {"command": command, "command_is_cut": cut or None} if command else {}


def _target(model: Any) -> Facts:
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "") or ""
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": sizes_of({name: getattr(config, name, None) for name in SIZES}),
        "source": source if HUB_ID.fullmatch(source) and not os.path.exists(source) else None,
        "own_code": bool(getattr(type(model), "_auto_class", None)),
    }


def _guide(trainer: GuidedTrainer) -> Facts:
    from hf_guidance.guide.freezing import BATCH_NORM

    guide, config = trainer.guide, getattr(trainer.guide, "config", None)
    norm = any(isinstance(module, BATCH_NORM) for module in guide.modules())
    sizes = sizes_of({name: getattr(config, name, None) for name in SIZES})
    own: Facts = {name: getattr(config, name, None) for name in ("model_type", "architecture")}
    timms = known({"timm": timms_name(own)})
    return trainer.guide_identity | {"sizes": sizes, "batch_norm": norm} | timms


def timms_name(config: Mapping[str, Json]) -> str | None:
    """Return the architecture behind transformers' timm wrapper, which is one class for all of them."""
    name = config.get("architecture") if config.get("model_type") == "timm_wrapper" else None
    return None if name is None else str(name)


def sizes_of(config: Mapping[str, Json]) -> dict[str, Json]:
    """Select the sizes in a network's config, named in words."""
    return {name.replace("_", " "): config[name] for name in SIZES if config.get(name) is not None}


def pairs_facts(points: list[dict[str, float]], debiased: list[dict[str, float]] | None = None) -> Facts | None:
    """Return the similarity of every pair in the first and the last log, and its debiased CKA in the last one.

    Each is a mean over the steps since the previous log. It is None if LayerDrop skipped the target layer in all of
    these steps.

    Args:
        points: Result of `similarity_curves`.
        debiased: Result of `debiased_curves`.
    """
    if not points:
        return None
    first, last = points[0], points[-1]
    before = max((point["step"] for point in points if point["step"] < last["step"]), default=0)
    beside = debiased[-1] if debiased else {}
    rows = [
        {
            "target": t,
            "guide": g,
            "first": first.get(f"{t}~{g}"),
            "last": last.get(f"{t}~{g}"),
            "debiased": beside.get(f"{t}~{g}"),
        }
        for t, g in (name.split("~") for name in dict.fromkeys(n for point in points for n in point) if name != "step")
    ]
    return {"first": first["step"], "before_last": before, "last": last["step"], "rows": rows}


def stopped_at(trainer: GuidedTrainer) -> int | None:
    """Return the step at which guidance stopped because of `guidance_stop_similarity`; None if it did not."""
    stop = stop_among(trainer.callback_handler.callbacks)
    return None if stop is None else stop.stopped_at


def best_step(trainer: Trainer | GuidedTrainer) -> int | None:
    """Return the step of the best weights if training has ended and loaded them; else None."""
    state, args = trainer.state, trainer.args
    over = any("train_runtime" in log for log in state.log_history)  # logged after the best weights are loaded
    if not (args.load_best_model_at_end and state.best_model_checkpoint and over):
        return None
    return int(str(state.best_model_checkpoint).rstrip("/").rpartition("-")[2])


def _results(history: History, best: int | None = None) -> Facts | None:
    at_best = [log for log in history if log.get("step") == best and metrics_of(log, "eval")]
    if at_best and not any(metrics_of(log, "test") for log in history):
        return {"split": "validation", "values": metrics_of(at_best[-1], "eval"), "best_step": best}
    for split, name in (("test", "test"), ("eval", "validation")):
        if logs := [log for log in history if metrics_of(log, split)]:
            last = [metrics_of(log, split) for log in logs if log.get("step") == logs[-1].get("step")]
            return {"split": name, "values": {n: v for values in last for n, v in values.items()}}  # of several sets
    return None


def training_facts(settings: Mapping[str, Json], steps: int, seed: int) -> Facts:
    """Select the training settings that the card shows."""
    half = "bfloat16" if settings["bf16"] else "float16" if settings["fp16"] else None
    numbers: dict[str, Any] = dict(settings)
    accumulated, decay, clip = (numbers[n] for n in ("gradient_accumulation_steps", "weight_decay", "max_grad_norm"))
    schedule = str(settings["lr_scheduler_type"]).replace("_", " ")
    return {
        "steps": steps,
        "batch size": settings["per_device_train_batch_size"],
        "accumulated over": f"{accumulated} batches" if accumulated > 1 else None,
        "processes": settings["world_size"],
        "learning rate": f"{numbers['learning_rate']:g}, {schedule}",
        "optimizer": str(settings["optim"]),
        "weight decay": f"{decay:g}" if decay else None,
        "gradients clipped at": f"{clip:g}" if clip else None,
        "precision": f"{half} autocast, similarities in float32" if half else "float32",
        "seed": seed,
    }


def _cost(trainer: GuidedTrainer) -> Facts:
    seconds = next((log["train_runtime"] for log in trainer.state.log_history[::-1] if "train_runtime" in log), None)
    cost: Facts = {"hardware": environment()["device"]}
    clock = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, TrainingClock))
    if clock.steps:
        kind = "of CPU time" if trainer.args.device.type == "cpu" else "of GPU time"
        what = {None: "a step", True: "a step with guidance", False: "a step, guided or not, on average"}[
            _always(trainer)
        ]
        cost[what] = f"{clock.seconds / clock.steps:.3g} s {kind}"
    if seconds and not trainer.resumed:  # after a resume it is that of the last part only
        cost["time from first to last step"] = f"{seconds:.{0 if seconds >= 10 else 1}f} s, evaluations included"
    if torch.cuda.is_available():
        cost["peak memory of the GPU"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    else:
        cost["peak memory of the process"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
    if emissions := _emissions(trainer):
        cost["emissions, by codecarbon"] = f"{emissions:.3g} g CO₂eq"
    return cost


def _dashboard(args: TrainingArguments) -> str | None:
    """Return the address of the Space to which trackio sent the curves."""
    space = getattr(args, "trackio_space_id", None)
    return f"https://huggingface.co/spaces/{space}" if "trackio" in (args.report_to or ()) and space else None


def _always(trainer: GuidedTrainer) -> bool | None:
    """Tell whether every step was guided; None if no step was."""
    config = trainer.guidance
    if trainer.guide is None or not config.guidance_weight:
        return None
    ends = [step for step in (config.guidance_stop_step, stopped_at(trainer)) if step is not None]
    return all(step >= trainer.state.global_step for step in ends) and config.guidance_every == 1


def _emissions(trainer: GuidedTrainer) -> float | None:
    """Return the emissions in grams of CO₂ equivalents, if codecarbon measured this run."""
    measured = Path(str(trainer.args.output_dir)) / EMISSIONS
    callbacks = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    if "CodeCarbonCallback" not in callbacks or not measured.is_file():
        return None
    rows = list(csv.DictReader(measured.read_text(encoding="utf-8").splitlines()))  # a row per run, this run's last
    return 1000 * float(rows[-1]["emissions"]) if rows else None
