"""What a model card says of a run, gathered from the trainer: the user writes nothing."""

from __future__ import annotations

import os
import resource
from typing import Any

import torch

from hf_guidance.runtime import environment

Facts = dict[str, Any]
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
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


def run_facts(trainer: Any, **given: Any) -> Facts:
    """Facts of a trainer's run as plain JSON values, for `model_card.render`.

    Args:
        trainer: a `GuidanceTrainer` that has trained.
        **given: facts that the trainer cannot know (license, language, tags, command, data, comparison, figures), in
            place of those it does; those of the ``target`` beside.
    """
    guided = trainer.guide is not None
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    repository = trainer.hub_model_id if trainer.args.push_to_hub or trainer.hub_model_id else None
    facts: Facts = {
        "name": (repository or os.path.basename(os.path.abspath(trainer.args.output_dir))).split("/")[-1],
        "repository": repository,
        "target": _target(model),
        "guide": _guide(trainer) if guided else None,
        "guidance": trainer.guidance.without_paths() if guided else None,
        "pairs": _pairs(trainer.state.log_history) if guided else None,
        "results": _results(trainer.state.log_history),
        "training": _training(trainer),
        "cost": _cost(trainer),
        "data": _data(trainer),
        "versions": {k: v for k, v in environment().items() if k in ("python", "torch", "transformers", "accelerate")},
    }
    facts["target"] |= given.pop("target", {})
    facts |= {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in facts.items() if value is not None}


def _target(model: Any) -> Facts:
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "") or ""
    known = source if source and not os.path.exists(source) and not os.path.isabs(source) else None
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": _sizes(config),
        "source": known,
        "own_code": bool(getattr(type(model), "_auto_class", None)),
    }


def _guide(trainer: Any) -> Facts:
    from hf_guidance.guide import BATCH_NORM

    guide = trainer.guide
    norm = any(isinstance(module, BATCH_NORM) for module in guide.modules())
    return trainer.guide_identity | {"sizes": _sizes(getattr(guide, "config", None)), "batch_norm": norm}


def _sizes(config: Any) -> Facts:
    values = {name: getattr(config, name, None) for name in SIZES}
    return {name.replace("_", " "): value for name, value in values.items() if value is not None}


def _pairs(history: list[dict[str, Any]]) -> Facts | None:
    prefix = "guidance/similarity/"
    logs = [log for log in history if any(name.startswith(prefix) for name in log)]
    if not logs:
        return None
    names = [name.removeprefix(prefix) for name in logs[0] if name.startswith(prefix)]
    rows = [
        {"target": t, "guide": g, "first": logs[0][f"{prefix}{t}~{g}"], "last": logs[-1][f"{prefix}{t}~{g}"]}
        for t, g in (name.split("~") for name in names)
        if f"{prefix}{t}~{g}" in logs[-1]
    ]
    return {"first": logs[0]["step"], "last": logs[-1]["step"], "rows": rows}


def _results(history: list[dict[str, Any]]) -> Facts | None:
    for split in ("test", "eval"):
        for log in reversed(history):
            values = {n.removeprefix(f"{split}_"): v for n, v in log.items() if n.startswith(f"{split}_")}
            values = {n: float(v) for n, v in values.items() if n not in SPEED and isinstance(v, (int, float))}
            if values:
                return {"split": "test" if split == "test" else "validation", "values": values}
    return None


def _training(trainer: Any) -> Facts:
    args = trainer.args
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    accumulated = args.gradient_accumulation_steps
    return {
        "steps": trainer.state.global_step,
        "batch size": args.per_device_train_batch_size,
        "accumulated over": f"{accumulated} batches" if accumulated > 1 else None,
        "processes": args.world_size,
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "optimizer": getattr(args.optim, "value", args.optim),
        "weight decay": f"{args.weight_decay:g}" if args.weight_decay else None,
        "gradients clipped at": f"{args.max_grad_norm:g}" if args.max_grad_norm else None,
        "precision": f"{half} autocast, similarities in float32" if half else "float32",
        "seed": args.seed,
    }


def _cost(trainer: Any) -> Facts:
    seconds = next((log["train_runtime"] for log in trainer.state.log_history[::-1] if "train_runtime" in log), None)
    cost: Facts = {"hardware": environment()["device"]}
    if seconds:
        cost["time from first to last step"] = f"{seconds:.0f} s, evaluations included"
    if torch.cuda.is_available():
        cost["peak memory of the GPU"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    else:
        cost["peak memory of the process"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
    return cost


def _data(trainer: Any) -> Facts | None:
    info = getattr(trainer.train_dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    if not name:
        return None
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    return {"name": name, "rows to train on": f"{rows:,}" if rows else None}
