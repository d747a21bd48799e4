"""Parity: is the number of ones in a bit string odd?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import DataCollatorWithPadding, EvalPrediction

from .base import Task, argmax_predictions
from .strings import draw_strings, ragged
from .vocabulary import symbol_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


def parity(
    min_length: int = 2,
    max_length: int = 50,
    train_size: int = 80_000,
    eval_size: int = 10_000,
    test_size: int = 10_000,
    seed: int = 0,
) -> Task:
    """Build the parity task: bit strings, labelled 1 if the number of ones is odd, else 0. No string is in two splits.

    Args:
        min_length: Bits in the shortest string.
        max_length: Bits in the longest string.
        train_size: Number of training rows.
        eval_size: Number of validation rows.
        test_size: Number of test rows.
        seed: Seed of the strings.

    Returns:
        The task; its metric is `accuracy`.

    Raises:
        ValueError: If a number is too small, or the lengths allow no string of some split.

    Source: Subramaniam et al., NeurIPS 2025 (arXiv 2410.20035); the lengths are the paper's, the sizes ours.
    """
    lengths = {"min_length": min_length, "max_length": max_length}
    sizes = {"train": train_size, "eval": eval_size, "test": test_size}
    splits = {
        split: _rows(*draw_strings(split, size, **lengths, num_symbols=2, seed=seed)) for split, size in sizes.items()
    }
    tokenizer = symbol_tokenizer(["0", "1"])
    return Task(
        name="parity",
        description=f"Tell whether a string of {min_length} to {max_length} bits has an odd number of ones.",
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        test_dataset=splits["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=_accuracy,
        preprocess_logits_for_metrics=argmax_predictions,
        metric="accuracy",
        higher_is_better=True,
        chance=0.5,
    )


def limit_length(dataset: Dataset, max_length: int) -> Dataset:
    """Select the rows of at most `max_length` tokens, for a curriculum that starts with short ones.

    Args:
        dataset: Rows with `input_ids`.
        max_length: Tokens in the longest row to keep.

    Raises:
        ValueError: If no row is that short.
    """
    from pyarrow.compute import list_value_length

    rows: Any = dataset.select_columns("input_ids").with_format("arrow")[:]
    lengths = list_value_length(rows["input_ids"]).to_numpy()
    if not (lengths <= max_length).any():
        raise ValueError(f"no row has at most {max_length} tokens; the shortest has {lengths.min()}")
    return dataset.select(np.flatnonzero(lengths <= max_length))


def length_curriculum(dataset: Dataset, max_lengths: Sequence[int], size: int, seed: int = 0) -> Dataset:
    """Order rows as a curriculum: equal stages, each drawn at random from the strings up to its length.

    Train on it in order (`train_sampling_strategy="sequential"`).

    Args:
        dataset: Rows to draw from, with replacement.
        max_lengths: Tokens in the longest string of each stage.
        size: Total number of rows.
        seed: Seed of the draw.

    Raises:
        ValueError: If a stage has no row to draw from.
    """
    from datasets import concatenate_datasets

    generator = np.random.default_rng(seed)
    stages = []
    for number, max_length in enumerate(max_lengths):
        rows = limit_length(dataset, max_length)
        share = size * (number + 1) // len(max_lengths) - size * number // len(max_lengths)
        stages.append(rows.select(generator.integers(len(rows), size=share)))
    return concatenate_datasets(stages)


def _rows(bits: np.ndarray, lengths: np.ndarray) -> Dataset:
    """Build labelled rows of tokens from bits `(n, max_length)` and lengths `(n,)`."""
    from datasets import Dataset

    valid = np.arange(bits.shape[1]) < lengths[:, None]
    return Dataset.from_dict({"input_ids": ragged(bits, lengths), "labels": (bits * valid).sum(1) % 2})


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    from .metrics import Accuracy

    return Accuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)
