"""Paired differences against arithmetic by hand, and Holm's adjustment against a worked example."""

from __future__ import annotations

from typing import Any

import pytest

from hf_guidance.experiments.verdicts import difference, gains, holm, in_words

ACCURACY = {"metric": "accuracy", "percent": True}
PERPLEXITY = {"metric": "perplexity", "percent": False, "higher_is_better": False}


def record(run: str, seed: int, value: float, metric: str = "accuracy") -> Any:
    guide = {"architecture": "G"} if "guide" in run and run != "guide_itself" else None
    return {"run": run, "seed": seed, "test": {metric: value}, "guide": guide}


def test_gains_are_points_over_the_baseline_of_the_same_seed_at_equal_steps_and_at_equal_time() -> None:
    values = {
        "alone": (0.50, 0.52, 0.54),
        "alone_equal_time": (0.55, 0.52, 0.56),
        "trained_guide": (0.60, 0.65, 0.61),
        "guide_itself": (0.9, 0.9, 0.9),
    }
    results = [record(run, seed, value) for run, row in values.items() for seed, value in enumerate(row)]
    steps, time = gains(results, ACCURACY)
    assert (steps["run"], steps["baseline"], steps["unit"]) == ("trained_guide", "alone", "points")
    assert steps["values"] == pytest.approx({0: 10.0, 1: 13.0, 2: 7.0})
    t = 10 / (3 / 3**0.5)
    # mean 10, standard deviation 3, t of two degrees of freedom at 97.5 %: 4.3027
    assert steps["interval"] == pytest.approx((10 - 4.3027 * 3 / 3**0.5, 10 + 4.3027 * 3 / 3**0.5), abs=1e-3)
    assert steps["p"] == pytest.approx(1 - t / (t**2 + 2) ** 0.5)
    assert time["baseline"] == "alone_equal_time"
    assert time["values"] == pytest.approx({0: 5.0, 1: 13.0, 2: 5.0})
    words = "trained guide − alone, equal steps, test: +10.0 points [+2.5, +17.5] (seeds 0 1 2: +10.0, +13.0, +7.0)"
    assert in_words(steps) == words


def test_a_lower_perplexity_is_a_gain_in_percent() -> None:
    results = [record("alone", 0, 200.0, "perplexity"), record("trained_guide", 0, 180.0, "perplexity")]
    (found,) = gains(results, PERPLEXITY)
    assert (found["unit"], found["mean"]) == ("%", pytest.approx(10.0))


def test_of_fewer_than_three_seeds_there_is_no_interval() -> None:
    found = difference("trained_guide", "alone", {0: 1.0, 1: 3.0}, "points")
    assert (found["mean"], found["interval"], found["p"]) == (2.0, None, None)
    assert in_words(found) == "trained guide − alone, equal steps, test: +2.0 points (seeds 0 1: +1.0, +3.0)"


def test_seeds_that_only_one_of_two_runs_has_are_left_out() -> None:
    results = [record("alone", 0, 0.5), record("trained_guide", 0, 0.6), record("trained_guide", 1, 0.9)]
    assert gains(results, ACCURACY)[0]["values"] == pytest.approx({0: 10.0})
    assert gains(results[1:], ACCURACY) == []


def test_holm_multiplies_by_the_claims_that_are_left_and_never_falls() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
