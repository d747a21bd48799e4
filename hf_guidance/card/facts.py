"""Facts of a model card on the data and their preparation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

from torch.utils.data import Dataset, IterableDataset
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

from hf_guidance.config import Json

if TYPE_CHECKING:
    import datasets

Value = TypeVar("Value")
Rows: TypeAlias = "Dataset[Any] | IterableDataset[Any] | datasets.Dataset | datasets.IterableDataset"
Processing: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin

Facts = dict[str, Any]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FROM_HUB = re.compile(r"/([^/]+)___([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})/")  # path of a file in the cache of `datasets`
ANY_TEXT = "Once upon a time"
COPY = "3 1 4 1 5 9 2 6 <copy>" + 8 * " <blank>"
# by name of the task, for tasks whose tokenizer knows no words
EXAMPLES: dict[str, Facts] = {
    "copy_paste": {"text": COPY, "copies": True},
    "parity": {"text": "1 0 1 1 0 1"},
    "language_modeling": {"text": ANY_TEXT},
}
OPTIONS = {
    "min_length": "shortest string",
    "max_length": "longest string",
    "eval_size": "rows to validate with",
    "test_size": "rows to test with",
    "max_eval_blocks": "blocks to validate and to test with, at most",
    "vocab_size": "tokens in the vocabulary",
}
NOT_SHOWN = ("task", "train_size", "dataset", "text_files", "guide_source", "target", "guide")


def known(facts: Mapping[str, Value]) -> dict[str, Value]:
    """Select the facts that are neither None nor empty."""
    return {name: value for name, value in facts.items() if value is not None and value not in ({}, [], "")}


def rows_facts(rows: Rows | None) -> Facts:
    """Collect name, Hub id and revision of a training set, if it has them, and its size."""
    name = getattr(getattr(rows, "info", None), "dataset_name", None)
    kept = [Path(file["filename"]).as_posix() for file in getattr(rows, "cache_files", None) or ()]
    source = next((match for file in kept if (match := FROM_HUB.search(file))), None)
    facts: Facts = {"name": name}
    facts |= {"id": f"{source[1]}/{source[2]}", "revision": source[3]} if source else {}
    return known(facts | {"rows to train on": f"{len(rows):,}" if isinstance(rows, Sized) else None})


def processing_facts(processing: Processing | None) -> Facts:
    """Describe how a tokenizer or image processor prepares its input; empty for any other class."""
    if _is_text(processing):
        return {"tokenizer": f"{type(processing).__name__}, {len(processing):,} tokens"}
    images: Any = processing
    if not getattr(images, "image_mean", None):
        return {}
    crop = images.crop_size if getattr(images, "do_center_crop", False) else None
    sides = [side for side in dict(crop or images.size or {}).values() if side]
    return known({"images": " × ".join(map(str, sides)) + " pixels" if sides else None}) | {
        "normalised by": _mean_and_std(images.image_mean, images.image_std)
    }


def _mean_and_std(mean: Any, std: Any) -> str:
    few = [" ".join(f"{number:.4g}" for number in numbers) for numbers in (mean, std)]
    return f"mean {few[0]}, std {few[1]}"


def _is_text(processing: Processing | None) -> TypeGuard[PreTrainedTokenizerBase]:
    return hasattr(processing, "all_special_ids") and hasattr(processing, "__len__")


def example_of(processing: Processing | None) -> Facts | None:
    """Choose a text for the card's code that the tokenizer knows: the start of a tale, or some of its own tokens."""
    if not _is_text(processing):
        return None
    try:
        read = processing(ANY_TEXT, add_special_tokens=False)["input_ids"]
    except Exception:  # a tokenizer with only a few symbols raises at any other
        read = []
    if set(read) - {getattr(processing, "unk_token_id", None)}:
        return {"text": ANY_TEXT}
    special = set(processing.all_special_ids)
    return {"text": processing.decode([i for i in range(len(processing)) if i not in special][:4])}


def task_facts(name: str, description: str, data: Mapping[str, Json]) -> Facts:
    """Collect the facts on a task's data that a card shows.

    Args:
        name: Name of the task.
        description: One sentence on the task.
        data: Settings that the data were made from.
    """
    made_from: Facts = dict(data)
    source = made_from.get("dataset") if not made_from.get("text_files") else None
    files = [file["name"] for file in made_from.get("text_files") or ()]
    folder = source.get("name") if isinstance(source, dict) else None
    if isinstance(source, str) and Path(source).is_absolute():
        folder = Path(source).name
    source = source if isinstance(source, str) and not folder and "/" in source and HUB_ID.fullmatch(source) else None
    title = folder or source or made_from.get("dataset") if not files else ", ".join(files)
    facts: Facts = {"name": title or f"{name.replace('_', ' ')} data made on the fly", "id": source}
    facts["task"] = description
    for option, value in data.items():
        shown = option not in NOT_SHOWN and not (files and option == "dataset_config")
        shown = shown and (option != "shuffle_buffer" or bool(data.get("streaming")))
        if shown and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            facts[OPTIONS.get(option, option.replace("_", " "))] = value
    if isinstance(pixels := made_from.get("target"), dict) and "mean" in pixels:
        facts["images"] = f"{pixels['size']} × {pixels['size']} pixels"
        facts["normalised by"] = _mean_and_std(pixels["mean"], pixels["std"])
        theirs = made_from.get("guide") or pixels
        if theirs["size"] != pixels["size"]:
            facts["images of the guide"] = f"{theirs['size']} × {theirs['size']} pixels"
    return known(facts)
