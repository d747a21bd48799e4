"""Errors that two networks make on the same samples, more often than by chance."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hf_guidance.analysis.heat_maps import plot_matrix

Matrix: TypeAlias = dict[str, dict[str, float]]

NO_LABEL = -100  # of samples that the loss of transformers leaves out
KINDS = {**dict.fromkeys("biuf", "numbers"), **dict.fromkeys("US", "text")}  # of a dtype → what classes are


def error_consistency(predictions_a: ArrayLike, predictions_b: ArrayLike, labels: ArrayLike) -> float:
    """Compute Cohen's κ of two networks' errors: 1 if they err on the same samples, 0 if as often as by chance.

    κ = (c_obs − c_exp) / (1 − c_exp). c_obs is the share of the samples on which both are right or both are wrong;
    c_exp = p_a p_b + (1 − p_a)(1 − p_b), the same for independent errors at accuracies p_a and p_b.

    Args:
        predictions_a: Predicted classes of one network, `(samples,)`: a tensor, an array or a list.
        predictions_b: Those of the other, on the same samples.
        labels: True classes, `(samples,)`.

    Returns:
        A number from −1 to 1; NaN if both make no error, or no hit, as chance then explains everything.

    Raises:
        ValueError: If the three have other shapes than `(samples,)`, there is no sample, a value is NaN, a label is
            −100, or the three are not all numbers, or all text.

    Source: Geirhos et al. 2020 (arXiv 2006.16736), section 2.
    """
    given = {"predictions_a": predictions_a, "predictions_b": predictions_b, "labels": labels}
    arrays = {name: _as_array(name, values) for name, values in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or len(arrays["labels"].shape) != 1 or not arrays["labels"].size:
        raise ValueError(
            f"error_consistency needs one class per sample, (samples,), three times; got {shapes}. Take the argmax of "
            "logits first."
        )
    _check_are_classes(arrays)
    a, b = (arrays[name] == arrays["labels"] for name in ("predictions_a", "predictions_b"))
    observed, p_a, p_b = float((a == b).mean()), float(a.mean()), float(b.mean())
    expected = p_a * p_b + (1 - p_a) * (1 - p_b)
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def _as_array(name: str, values: ArrayLike) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # numpy has no bfloat16
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is ragged ({error}); expected one class per sample, (samples,).") from error
    is_text = array.dtype == object and all(isinstance(value, str) for value in array.flat)  # as pandas keeps it
    return array.astype(str) if is_text else array


def _check_are_classes(arrays: Mapping[str, NDArray[Any]]) -> None:
    kinds = {name: KINDS.get(array.dtype.kind, str(array.dtype)) for name, array in arrays.items()}
    if len(set(kinds.values())) > 1 or not set(kinds.values()) <= set(KINDS.values()):
        raise ValueError(
            f"error_consistency compares classes that are all numbers, or all text; got {kinds}. Name the classes "
            "alike in all three."
        )
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ValueError(f"{name} holds {int(np.isnan(array).sum())} NaN; expected a class for each sample.")
    if kinds["labels"] == "numbers" and (ignored := int((arrays["labels"] == NO_LABEL).sum())):
        raise ValueError(
            f"labels hold {ignored} times {NO_LABEL}, which marks positions without a label: leave these out of labels "
            f"and predictions (keep = labels != {NO_LABEL})."
        )


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
