"""The error consistency of a recipe's runs, from the predictions that they saved."""

import numpy as np
import pytest

from hf_guidance.experiments import consistency
from hf_guidance.experiments.consistency import plot_errors

RUNS = [{"run": "alone", "seed": 3}, {"run": "trained_guide", "seed": 3}, {"run": "alone", "seed": 4}]


def save(folder, run, predictions):
    place = folder / f"seed-{run['seed']}" / run["run"]
    place.mkdir(parents=True)
    np.savez(place / "predictions.npz", predictions=predictions, labels=[0, 1, 0, 1])


def test_the_runs_of_the_first_seed_are_compared(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(consistency, "plot_error_consistency", lambda matrix, path: drawn.append(matrix))
    for run, predictions in zip(RUNS, ([0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]), strict=True):
        save(tmp_path, run, predictions)
    assert plot_errors(RUNS, tmp_path, tmp_path / "errors.png")
    (matrix,) = drawn
    assert list(matrix) == ["alone", "trained guide"]
    assert matrix["alone"]["alone"] == 1
    assert matrix["alone"]["trained guide"] == pytest.approx(0)  # half are right in each, one error is shared


def test_one_network_is_nothing_to_compare(tmp_path):
    assert not plot_errors([], tmp_path, tmp_path / "errors.png")
    save(tmp_path, RUNS[0], [0, 1, 0, 1])
    assert not plot_errors(RUNS, tmp_path, tmp_path / "errors.png")
    assert not (tmp_path / "errors.png").exists()
