"""Copy-paste: read a string of symbols, then write it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from transformers import DataCollatorForTokenClassification, EvalPrediction

from .base import IGNORED_LABEL, Task, argmax_predictions
from .strings import draw_strings, ragged
from .vocabulary import symbol_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


def copy_paste(
    min_length: int = 20,
    max_length: int = 40,
    num_symbols: int = 10,
    train_size: int = 80_000,
    eval_size: int = 10_000,
    test_size: int = 10_000,
    seed: int = 0,
) -> Task:
    """Build the copy-paste task: a string, a copy marker, and one blank per symbol, where the copy is written.

    A row is `s1 ... sL <copy> <blank> ... <blank>`, 2L + 1 tokens. Its labels hold the string at the blanks and are
    ignored elsewhere. The loss of a causal language model shifts them by one: `<copy>` predicts s1, the first blank s2,
    and so on. Accuracy therefore counts copied symbols only. No string is in two splits.

    Args:
        min_length: Symbols in the shortest string.
        max_length: Symbols in the longest string.
        num_symbols: Size of the alphabet.
        train_size: Number of training rows.
        eval_size: Number of validation rows.
        test_size: Number of test rows.
        seed: Seed of the strings.

    Returns:
        The task; its metric is `accuracy`.

    Raises:
        ValueError: If a number is too small, or the lengths allow no string of some split.

    Source: Subramaniam et al., NeurIPS 2025 (arXiv 2410.20035); the defaults are the paper's.
    """
    lengths = {"min_length": min_length, "max_length": max_length}
    sizes = {"train": train_size, "eval": eval_size, "test": test_size}
    splits = {
        split: _rows(*draw_strings(split, size, **lengths, num_symbols=num_symbols, seed=seed), num_symbols)
        for split, size in sizes.items()
    }
    tokenizer = symbol_tokenizer([*map(str, range(num_symbols)), "<copy>", "<blank>"])
    return Task(
        name="copy_paste",
        description=f"Write {min_length} to {max_length} symbols again, right after reading them.",
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        test_dataset=splits["test"],
        data_collator=DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED_LABEL),
        processing_class=tokenizer,
        compute_metrics=_copied,
        preprocess_logits_for_metrics=argmax_predictions,
        metric="accuracy",
        higher_is_better=True,
        chance=1 / num_symbols,
    )


def _rows(symbols: np.ndarray, lengths: np.ndarray, num_symbols: int) -> Dataset:
    """Build rows of tokens and labels from strings `(n, max_length)` and their lengths `(n,)`."""
    from datasets import Dataset

    copy, blank = num_symbols, num_symbols + 1
    position = np.arange(2 * symbols.shape[1] + 1)
    marker = lengths[:, None]
    string = np.pad(symbols, [(0, 0), (0, symbols.shape[1] + 1)])
    pasted = np.take_along_axis(symbols, (position - marker - 1).clip(0, symbols.shape[1] - 1), axis=1)
    tokens = np.select([position < marker, position == marker], [string, copy], blank)
    labels = np.where(position > marker, pasted, IGNORED_LABEL)
    ends = 2 * lengths + 1
    return Dataset.from_dict({"input_ids": ragged(tokens, ends), "labels": ragged(labels, ends)})


def _copied(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the accuracy of predictions `(n, length)` against labels `(n, length)` one position later."""
    from .metrics import TokenAccuracy

    predictions, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return TokenAccuracy().compute(predictions=predictions[:, :-1].ravel(), references=labels[:, 1:].ravel())
