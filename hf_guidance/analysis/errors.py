"""Errors that two networks make on the same samples, more often than by chance."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from hf_guidance.analysis.heat_maps import plot_matrix

Matrix: TypeAlias = dict[str, dict[str, float]]


def error_consistency(predictions_a: ArrayLike, predictions_b: ArrayLike, labels: ArrayLike) -> float:
    """Compute Cohen's κ of two networks' errors: 1 if they err on the same samples, 0 if as often as by chance.

    κ = (c_obs − c_exp) / (1 − c_exp). c_obs is the share of the samples on which both are right or both are wrong;
    c_exp = p_a p_b + (1 − p_a)(1 − p_b), the same for independent errors at accuracies p_a and p_b.

    Args:
        predictions_a: Predicted classes of one network, `(samples,)`.
        predictions_b: Those of the other, on the same samples.
        labels: True classes, `(samples,)`.

    Returns:
        A number from −1 to 1; NaN if both make no error, or no hit, as chance then explains everything.

    Raises:
        ValueError: If the three have other shapes than `(samples,)`, or there is no sample.

    Source: Geirhos et al. 2020 (arXiv 2006.16736), section 2.
    """
    given = {"predictions_a": predictions_a, "predictions_b": predictions_b, "labels": labels}
    arrays = {name: np.asarray(values) for name, values in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or len(arrays["labels"].shape) != 1 or not arrays["labels"].size:
        raise ValueError(
            f"error_consistency needs one class per sample, (samples,), three times; got {shapes}. Take the argmax of "
            "logits first."
        )
    a, b = (arrays[name] == arrays["labels"] for name in ("predictions_a", "predictions_b"))
    observed, p_a, p_b = float((a == b).mean()), float(a.mean()), float(b.mean())
    expected = p_a * p_b + (1 - p_a) * (1 - p_b)
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def error_consistency_matrix(predictions: Mapping[str, ArrayLike], labels: ArrayLike) -> Matrix:
    """Compute the error consistency of every network with every other, and with itself.

    Args:
        predictions: Name of a network → its predicted classes, `(samples,)`.
        labels: True classes, `(samples,)`.

    Returns:
        Name → name → error consistency.

    Raises:
        ValueError: As `error_consistency` does.
    """
    found: Matrix = {name: {} for name in predictions}
    for one, other in product(predictions, predictions):
        found[one][other] = error_consistency(predictions[one], predictions[other], labels)
    return found


def plot_error_consistency(matrix: Matrix, path: str | os.PathLike[str]) -> None:
    """Draw a matrix of error consistencies with its values, and save the figure.

    Args:
        matrix: From `error_consistency_matrix`.
        path: Where to save the figure; the suffix decides the format.
    """
    names = list(matrix)
    values = [[matrix[one][other] for other in names] for one in names]
    plot_matrix(
        values,
        [["–" if math.isnan(value) else f"{value:.2f}" for value in line] for line in values],
        rows=names,
        columns=names,
        label="error consistency (Cohen's κ)",
        path=path,
        limits=(0.0, 1.0),
    )
