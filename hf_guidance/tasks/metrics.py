"""Metrics of the tasks: each is an `evaluate.Metric` that works offline and leaves no files."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from sklearn.metrics import accuracy_score

from .base import IGNORED_LABEL


class InMemoryMetric(evaluate.Metric):
    """A metric over flat columns, described by its own docstring."""

    columns: Features
    format: str | None = "numpy"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=self.columns, format=self.format
        )


class Accuracy(InMemoryMetric):
    """Fraction of predictions that equal their reference; higher is better.

    Args (of `compute`):
        predictions: Predicted classes, `(n,)`.
        references: True classes, `(n,)`.

    Returns:
        `accuracy`, between 0 and 1.
    """

    columns = Features({"predictions": Value("int64"), "references": Value("int64")})

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class TokenAccuracy(Accuracy):
    """Accuracy over the tokens that have a label; higher is better.

    Args (of `compute`):
        predictions: Predicted tokens, `(n,)`.
        references: True tokens, `(n,)`, -100 where a position does not count.

    Returns:
        `accuracy`, between 0 and 1.

    Raises:
        ValueError: If no position has a label.
    """

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        labelled = references != IGNORED_LABEL
        if not labelled.any():
            raise ValueError(
                f"no token to score: all {labelled.size} references are {IGNORED_LABEL}; check the labels' alignment"
            )
        return super()._compute(predictions[labelled], references[labelled])


class TopKAccuracy(InMemoryMetric):
    """Fraction of images whose class is the best prediction, and among the k best; higher is better.

    Args:
        k: Number of best classes.

    Args (of `compute`):
        predictions: Classes of each image, best first, `(n, ≥ min(k, classes))`.
        references: True classes, `(n,)`.

    Returns:
        `accuracy` and `top_k_accuracy` (k as given), between 0 and 1.
    """

    columns = Features({"predictions": List(Value("int64")), "references": Value("int64")})
    format = None  # rows of several numbers come as lists

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions)[:, : self.k] == np.asarray(references)[:, None]
        return {"accuracy": float(hits[:, 0].mean()), f"top_{self.k}_accuracy": float(hits.any(1).mean())}


class Perplexity(InMemoryMetric):
    """Exponential of the mean negative log-likelihood, per token and per word; lower is better.

    Args (of `compute`):
        predictions: Negative log-likelihood of each token in nats, `(n,)`.
        tokens_per_word: Mean number of tokens in a word of the text that was scored.

    Returns:
        `perplexity`, and `word_perplexity` = exp(mean negative log-likelihood · tokens per word), which compares models
        with different tokenizers.
    """

    columns = Features({"predictions": Value("float32")})

    def _compute(self, predictions: np.ndarray, tokens_per_word: float) -> dict[str, float]:
        nats = predictions.mean(dtype=np.float64)
        return {"perplexity": float(np.exp(nats)), "word_perplexity": float(np.exp(nats * tokens_per_word))}
