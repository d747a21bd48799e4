"""Rows of a dataset or of a text file, and a collator that makes batches of them for two networks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from hf_guidance.commands.networks import pixels_of
from hf_guidance.tasks import image_classification
from hf_guidance.tasks.image_decoding import ImageCollator, ImageDecoder, PixelFormat
from hf_guidance.tasks.image_rows import ImageRows
from hf_guidance.tasks.image_splits import digits, find_image_column
from hf_guidance.tasks.splits import read_splits

Collator: TypeAlias = Callable[[list[Any]], dict[str, Tensor]]
TEXT_FILES = (".txt", ".md")
SPLITS = ("validation", "test", "train")  # the first of these that there is


class Data(NamedTuple):
    """Rows, what makes a batch of them, and how many classes they have; 0 if none."""

    rows: Sequence[Any]
    collator: Collator
    classes: int = 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name data for two networks."""
    parser.add_argument("--data", required=True, help="Hub id or folder of a dataset; for text also a text file")
    parser.add_argument("--dataset_config", help="configuration of the dataset")
    parser.add_argument("--split", help="split of the dataset; found by default")
    parser.add_argument("--column", help="column with texts or images; found by default")
    parser.add_argument("--batch_size", type=int, default=32, help="rows in a batch (default 32)")
    parser.add_argument("--max_length", type=int, default=128, help="most tokens of a text (default 128)")
    parser.add_argument("--image_size", type=int, help="size of the images of both networks, in pixels")


def check_flags(given: argparse.Namespace) -> None:
    """Raise ValueError for numbers among the flags of data that make no batch."""
    for name in ("batch_size", "max_length", "image_size"):
        if (number := getattr(given, name)) is not None and number < 1:
            raise ValueError(f"--{name} is {number}; it must be at least 1.")


def read(
    given: argparse.Namespace,
    kind: str,
    names: Sequence[str],
    seeds: Sequence[int | None],
    *,
    decodes: bool = False,
    training: bool = False,
) -> Data:
    """Read the data that the flags name, for two networks.

    Args:
        given: The flags of `add_flags`.
        kind: `images` or `text`.
        names: Where both networks are.
        seeds: Seeds of their random weights; None for a trained one.
        decodes: As of `texts`.
        training: Read the rows to train on; images with their classes.
    """
    splits = SPLITS[::-1] if training else SPLITS
    if kind == "images":
        a, b = (pixels_of(name, seed, given.image_size) for name, seed in zip(names, seeds, strict=True))
        if training:
            return images_with_classes(given.data, given.dataset_config, a, b, given.column)
        return images(given.data, given.dataset_config, a, b, given.column, given.split)
    own = (given.column, given.split, decodes, splits)
    return texts(given.data, given.dataset_config, names[0], names[1], given.max_length, *own)


def images(
    dataset: str, config: str | None, a: PixelFormat, b: PixelFormat, column: str | None, split: str | None = None
) -> Data:
    """Read the images of a split, without their classes.

    Args:
        dataset: Hub id or folder.
        config: Name of its configuration.
        a: Format of the images of network a.
        b: That of network b, which gets images of its own if it differs.
        column: Name of the column with images; None finds it.
        split: Name of the split; None takes that for validation, else the test's, else any.

    Raises:
        ValueError: If there is no such split, or the column with images is not clear.
    """
    from datasets import Image

    splits = digits() if dataset == "digits" else read_splits(dataset, config, streaming=False)
    rows = _chosen(splits, dataset, split, SPLITS)
    try:
        name = find_image_column(rows.features, dataset, column)
    except ValueError as error:
        raise ValueError(str(error).replace("set image_column", "name it with --column")) from error
    encoded = rows.select_columns([name]).cast_column(name, Image(decode=False))
    sizes = (a.size,) if a.size == b.size else (a.size, b.size)
    decoded: Any = ImageRows(encoded, ImageDecoder(sizes, (name, None)))
    return Data(decoded, ImageCollator(a, b))


def images_with_classes(dataset: str, config: str | None, a: PixelFormat, b: PixelFormat, column: str | None) -> Data:
    """Read the images to train on, with their classes; the arguments are those of `images`."""
    task = image_classification(
        dataset, dataset_config=config, target=a, guide=None if a == b else b, image_column=column
    )
    return Data(task.train_dataset, task.data_collator, len(task.labels))


def texts(
    dataset: str,
    config: str | None,
    a: str,
    b: str,
    length: int,
    column: str | None,
    split: str | None = None,
    decodes: bool = False,
    splits: Sequence[str] = SPLITS,
) -> Data:
    """Read the texts of a dataset, or the lines of a file.

    Args:
        dataset: Hub id, folder or text file.
        config: Name of its configuration.
        a: Where the tokenizer of network a is.
        b: Where that of network b is. If its tokens are others, the network gets columns of its own.
        length: Most tokens of a row.
        column: Name of the column with texts; None takes `text`, or the first one of strings.
        split: Name of the split; None takes the first of `splits` that there is.
        decodes: Whether a network has a decoder, which then sees the same tokens as its encoder.
        splits: Names of splits, best first.

    Raises:
        ValueError: If there is no text, or a network has no tokenizer.
    """
    ours, theirs = tokenizer_of(a), tokenizer_of(b)
    same = ours.get_vocab() == theirs.get_vocab()
    found = lines_of(dataset) if dataset.endswith(TEXT_FILES) else _column(dataset, config, column, split, splits)

    def collate(rows: list[str]) -> dict[str, Tensor]:
        batch = _tokens(ours, rows, length, decodes)
        own = {} if same else _tokens(theirs, rows, length, decodes)
        return batch | {f"guide_{name}": value for name, value in own.items()}

    return Data(found, collate)


def lines_of(path: str) -> list[str]:
    """Return the lines of a text file that are not empty."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it.") from error
    if not lines:
        raise ValueError(f"{path} has no text.")
    return lines


def tokenizer_of(source: str) -> Any:
    """Load the tokenizer of a network; it pads with its end token if it has none for that.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} has no tokenizer that can be loaded ({' '.join(str(error).split())[:200]}): save it beside the "
            "network, or compare them in Python, by hf_guidance.analysis.compare."
        ) from error
    if not tokenizer("a text to try")["input_ids"]:
        raise ValueError(f"the tokenizer of {source} makes no tokens of a text: save its own beside the network.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or next(iter(tokenizer.get_vocab()))
    tokenizer.padding_side = "right"
    return tokenizer


def _tokens(tokenizer: Any, rows: list[str], length: int, decodes: bool) -> dict[str, Tensor]:
    made: Mapping[str, Tensor] = tokenizer(rows, padding=True, truncation=True, max_length=length, return_tensors="pt")
    found = {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in made}
    return found | {f"decoder_{name}": found[name] for name in ("input_ids", "attention_mask") if decodes}


def _column(dataset: str, config: str | None, column: str | None, split: str | None, best: Sequence[str]) -> list[str]:
    if os.path.isfile(dataset):
        raise ValueError(f"{dataset} is a file; expected a dataset, or a text file ({', '.join(TEXT_FILES)}).")
    rows = _chosen(read_splits(dataset, config, streaming=False), dataset, split, best)
    strings = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    name = column or ("text" if "text" in strings else next(iter(strings), None))
    if name not in strings:
        raise ValueError(
            f"{dataset} has columns {', '.join(rows.column_names)}, but no text in {column or 'any'}: name one of "
            f"strings with --column ({', '.join(strings) or 'there is none'})."
        )
    found = [text for text in rows[name] if text and text.strip()]
    if not found:
        raise ValueError(f"the column {name!r} of {dataset} has no text.")
    return found


def _chosen(splits: Mapping[str, Any], dataset: str, split: str | None, best: Sequence[str]) -> Any:
    """Return the split of this name, else the first of the best ones that there is."""
    chosen = split or next((name for name in best if name in splits), next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"{dataset} has no split {chosen!r}; it has {', '.join(splits)}.")
    return splits[chosen]
