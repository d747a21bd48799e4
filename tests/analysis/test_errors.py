"""Error consistency: by hand, by scikit-learn, and as a figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from hf_guidance.analysis import error_consistency, error_consistency_matrix, plot_error_consistency

LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 1, 2, 0, 0, 0, 1, 2], [0, 1, 2, 0, 2, 1, 2, 0], 1.0),  # other mistakes, on the same samples
        ([0, 1, 2, 0, 0, 0, 1, 2], [1, 2, 0, 1, 1, 2, 0, 1], -1.0),
        ([0, 1, 2, 0, 0, 0, 1, 2], [0, 1, 0, 1, 1, 2, 1, 2], 0.0),
        ([0, 1, 2, 0, 1, 2, 0, 2], [0, 1, 2, 0, 1, 2, 1, 1], (6 / 8 - 50 / 64) / (1 - 50 / 64)),
        (LABELS, [1, 2, 0, 1, 2, 0, 1, 2], 0.0),
    ],
)
def test_it_is_chance_corrected_agreement_of_the_errors(a: list[int], b: list[int], expected: float) -> None:
    assert error_consistency(a, b, LABELS) == pytest.approx(expected)
    assert error_consistency(b, a, LABELS) == pytest.approx(expected)


def test_it_is_cohens_kappa_of_being_right() -> None:
    draw = np.random.default_rng(0)
    labels, a, b = draw.integers(0, 4, (3, 500))
    assert error_consistency(a, b, labels) == pytest.approx(cohen_kappa_score(a == labels, b == labels))


def test_without_errors_or_without_hits_there_is_nothing_to_compare() -> None:
    assert math.isnan(error_consistency(LABELS, LABELS, LABELS))
    wrong = [label + 5 for label in LABELS]
    assert math.isnan(error_consistency(wrong, wrong, LABELS))


def test_a_matrix_has_all_networks_and_is_drawn(tmp_path: Path) -> None:
    predictions = {"alone": [0, 1, 2, 0, 0, 0, 1, 2], "guided": [0, 1, 0, 1, 1, 2, 1, 2], "perfect": LABELS}
    matrix = error_consistency_matrix(predictions, LABELS)
    assert matrix["alone"]["alone"] == 1
    assert matrix["alone"]["guided"] == matrix["guided"]["alone"] == 0
    assert math.isnan(matrix["perfect"]["perfect"])
    plot_error_consistency(matrix, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000


def test_logits_or_other_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs one class per sample.*got \{'predictions_a': \(8, 3\).*argmax"):
        error_consistency(np.zeros((8, 3)), LABELS, LABELS)
    with pytest.raises(ValueError, match=r"'predictions_b': \(7,\)"):
        error_consistency(LABELS, LABELS[:7], LABELS)
    with pytest.raises(ValueError, match="one class per sample"):
        error_consistency([], [], [])


WRONG = [1, 1, 2, 0, 0, 2, 0, 1]


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(WRONG),
        torch.tensor(WRONG, dtype=torch.bfloat16),
        torch.tensor(WRONG, dtype=torch.float32, requires_grad=True),
        np.array(WRONG, dtype=np.uint8),
    ],
)
def test_tensors_and_arrays_are_classes_as_lists_are(given: Any) -> None:
    other = [0, 1, 0, 1, 1, 2, 0, 1]
    assert error_consistency(given, other, torch.tensor(LABELS)) == error_consistency(WRONG, other, LABELS)


def test_classes_may_be_text() -> None:
    names = np.array(["cat", "dog", "owl"], dtype=object)
    texts = [names[classes] for classes in (WRONG, [0, 1, 0, 1, 1, 2, 0, 1], LABELS)]
    assert error_consistency(*texts) == error_consistency(WRONG, [0, 1, 0, 1, 1, 2, 0, 1], LABELS)
    assert error_consistency(*(list(text) for text in texts)) == error_consistency(*texts)


@pytest.mark.parametrize(
    ("a", "labels", "words"),
    [
        (list("01201201"), LABELS, "classes that are all numbers, or all text; got {'predictions_a': 'text', 'pred"),
        ([1j] * 8, LABELS, "'predictions_a': 'complex128'"),
        ([None] * 8, LABELS, "'predictions_a': 'object'"),
        ([math.nan, *LABELS[1:]], LABELS, "predictions_a holds 1 NaN; expected a class for each sample"),
        (LABELS, [*LABELS[:6], -100, -100], r"labels hold 2 times -100, .* leave these out .*keep = labels != -100"),
        ([[0, 1], [2]], LABELS, r"predictions_a is ragged \(.*\); expected one class per sample, \(samples,\)"),
    ],
)
def test_what_are_no_classes_of_samples_is_an_error(a: Any, labels: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        error_consistency(a, LABELS, labels)
