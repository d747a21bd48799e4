"""What a run of a comparison was made with, kept beside it, so that no other is taken for it."""

from __future__ import annotations

import json
import os
import re
import reprlib
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from hf_guidance.config import GuidanceConfig

SETTINGS = "settings.json"
# TrainingArguments that leave weights and curves as they are: where files go, what is printed, how data are loaded
HARMLESS = re.compile(
    r"output_dir|run_name|seed|report_to|disable_tqdm|(log|logging|save|hub|push|ddp|trackio|_n_gpu).*|project"
    r"|dataloader_(?!drop_last).*"
    r"|do_(train|eval|predict)|load_best_model_at_end|remove_unused_columns|resume_from_checkpoint|ignore_data_skip"
    r"|local_rank|debug|skip_memory_metrics|torch_empty_cache_steps|eval_(delay|on_start|accumulation_steps|do_.*)|include_.*"
)


def settings_of(
    model: PreTrainedModel, args: TrainingArguments, guidance: GuidanceConfig | None, data: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a run's weights and curves depend on, as JSON values.

    Args:
        model: the target.
        guidance: None for a run without a guide.
        data: what the task was built from.
    """
    network = json.loads(model.config.to_json_string(use_diff=True))
    network.pop("transformers_version", None)
    training = {name: value for name, value in args.to_dict().items() if not HARMLESS.fullmatch(name)}
    training |= {"world_size": args.world_size}
    settings = training | {
        "guidance": guidance.without_paths() if guidance else None,
        "data": data,
        "network": network,
    }
    return json.loads(json.dumps(settings, default=str))


def check_same_settings(place: Path, now: dict[str, Any]) -> None:
    """Raise ValueError if a folder holds a run of other settings, naming each that differs."""
    if not (place / SETTINGS).is_file():
        return
    then = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
    if then.get("guidance"):  # what did not exist when it ran is at its default
        then["guidance"] = GuidanceConfig().to_dict() | then["guidance"]
    if changed := _changed(then, now):
        raise ValueError(
            f"{place} holds a run with other settings: {', '.join(changed)}. Give another --output_dir, or remove "
            "that folder, and those of runs that used its network as their guide, to run it again."
        )


def _changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, each as ``name was 1, is 2``; those of a group as group.name."""
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


def check_writable(folder: Path) -> None:
    """Make a folder for results, or raise ValueError before there are any."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}): name another folder.") from error


def write_json(path: Path, content: Any) -> None:
    """Write all of a file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
