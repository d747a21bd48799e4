"""Rows of equally many tokens, made from text files or dataset splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from .splits import read_splits

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SPLITS = ("train", "validation", "test")
LINES = 1000  # lines tokenised at a time
SHUFFLE_BUFFER = 10_000  # blocks in the shuffle buffer of a stream


def read_files(paths: list[str]) -> dict[str, Dataset]:
    """Read local text as splits of lines: the first 90 % of the characters, then 5 % and 5 %, cut at line ends.

    Args:
        paths: UTF-8 files, joined in this order.

    Raises:
        ValueError: If a file is missing or none holds any text.
    """
    from datasets import Dataset

    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(f"text file not found: {', '.join(missing)} (from {Path.cwd()}); give paths of UTF-8 files")
    rows = [row for path in paths for row in StringIO(Path(path).read_text(encoding="utf-8"))]
    if not any(row.strip() for row in rows):
        raise ValueError(f"no text in {', '.join(paths) or 'an empty list of text files'}; give files with some text")
    ends = np.cumsum([len(row) for row in rows])
    cuts = [0, *np.searchsorted(ends, [0.90 * ends[-1], 0.95 * ends[-1]]), len(rows)]
    return {
        name: Dataset.from_dict({"text": rows[start:end]})
        for name, (start, end) in zip(SPLITS, pairwise(cuts), strict=True)
    }


def load_splits(dataset: str, config: str | None, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """Load the three splits of a dataset from the Hub or a local folder, each with a column `text`.

    Args:
        dataset: Hub id or folder.
        config: Name of its configuration, if it has several.
        streaming: Whether to stream the dataset instead of downloading it first.

    Raises:
        ValueError: If a split or the column is missing. Also all that `read_splits` raises.
    """
    found = read_splits(dataset, config, streaming)
    missing = [name for name in SPLITS if name not in found]
    if missing:
        raise ValueError(
            f"{dataset} has no split {', '.join(missing)}; it has {', '.join(found)}, and all of "
            f"{', '.join(SPLITS)} are needed: choose another dataset, or give its text as text_files"
        )
    for name in SPLITS:
        columns = list(next(iter(found[name]), {}))
        if "text" not in columns:
            raise ValueError(f"the {name} split of {dataset} has no column 'text', but {columns or 'no rows'}")
    return {name: found[name].select_columns("text") for name in SPLITS}


def lines(rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Yield the text of each non-empty row, ended by a line break so that words of two rows are not joined."""
    for row in rows:
        if row["text"]:
            yield row["text"] if row["text"].endswith("\n") else row["text"] + "\n"


def make_blocks(
    split: Dataset | IterableDataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    limit: int | None = None,
) -> Dataset:
    """Cut the text of a split into rows of `block_size` tokens, held in memory. The labels equal the tokens.

    Args:
        split: Rows with a column `text`.
        name: Name of the split, for errors.
        tokenizer: The tokenizer.
        block_size: Tokens in a row; tokens at the end that fill no row are dropped.
        limit: Maximum number of rows; `None` takes all.

    Raises:
        ValueError: If the text fills no row.
    """
    from datasets import Dataset

    text, tokens = lines(split), [np.empty(0, dtype=np.int32)]
    while (limit is None or sum(map(len, tokens)) < limit * block_size) and (batch := list(islice(text, LINES))):
        tokens.append(_encode(batch, tokenizer))
    rows = _cut(np.concatenate(tokens), block_size)[:limit]
    if not len(rows):
        raise ValueError(
            f"the {name} text has {sum(map(len, tokens))} tokens, too few for one block of {block_size}; give more "
            "text (in several lines, if it is to be split) or lower block_size"
        )
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def stream_blocks(
    split: IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int
) -> IterableDataset:
    """Cut a stream into rows as `make_blocks` does, while it is read, and shuffle them within a buffer.

    Each thousand lines drop the tokens that fill no row.

    Args:
        split: Rows with a column `text`.
        tokenizer: The tokenizer.
        block_size: Tokens in a row.
        seed: Seed of the order of the rows.

    Raises:
        ValueError: If the first thousand lines fill no row.
    """
    from datasets import Features, List, Value

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        text = list(lines({"text": text} for text in batch["text"]))
        rows = _cut(_encode(text, tokenizer), block_size).tolist()
        return {"input_ids": rows, "labels": rows}

    column = List(Value("int32"))
    blocks = split.map(
        cut,
        batched=True,
        batch_size=LINES,
        remove_columns=split.column_names,
        features=Features({"input_ids": column, "labels": column}),
    )
    if next(iter(blocks), None) is None:
        raise ValueError(f"the train text is too short for one block of {block_size} tokens; lower block_size")
    return blocks.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def _encode(text: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return np.fromiter(chain.from_iterable(ids), dtype=np.int32)


def _cut(tokens: np.ndarray, block_size: int) -> np.ndarray:
    return tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)
