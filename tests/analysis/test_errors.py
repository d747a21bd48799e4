"""Error consistency: by hand, by scikit-learn, and as a figure."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
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
