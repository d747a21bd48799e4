"""Ratios of seconds against arithmetic done by hand."""

import pytest

from hf_guidance.experiments.cost.ratios import middle_and_least, overhead_of_rounds, summary


def test_a_cached_guides_split_has_no_guide_and_the_papers_floor_still_has():
    seconds = {"plain": 1.0, "guide": 3.0, "guided": 1.5, "paper": 8.0}
    found = {name: {"median": value, "minimum": value} for name, value in seconds.items()}
    found["plain"]["forward"] = {"median": 0.25, "minimum": 0.25}
    found["guided"]["forward"] = {"median": 0.5, "minimum": 0.5}
    result = summary({**found, "guide_forwards": 0.0, "batches_of_a_step": 1})
    assert result["split"] == {"guide_forward": 0.0, "grams_and_measures": 0.25, "extra_backward": 0.25}
    assert (result["overhead"]["median"], result["paper_overhead"]["median"]) == (1.5, 2.0)
    assert result["paper_over_plain"]["minimum"] == 8.0
    twice = summary({**found, "guide_forwards": 2.0, "batches_of_a_step": 2})
    assert (twice["overhead"]["median"], twice["paper_overhead"]["median"]) == (1.5 / 7, 8 / 7)


def test_overhead_of_rounds_is_of_what_ran_beside_each_other():
    seconds = {"plain": [1.0, 1.0, 2.0, 4.0], "guide": [2.0, 2.0, 5.0, 5.0], "guided": [3.0, 3.6, 8.0, 9.6]}
    found = {name: {"all": values} for name, values in seconds.items()} | {"guide_forwards": 1.0}
    of_rounds = overhead_of_rounds(found, rounds=2)
    assert of_rounds["all"] == [pytest.approx(1.1), pytest.approx(1.1)]
    assert (of_rounds["mean"], of_rounds["standard_error"]) == (pytest.approx(1.1), pytest.approx(0, abs=1e-9))
    every = overhead_of_rounds({**found, "guide_forwards": 0.0}, rounds=4)
    assert every["all"] == pytest.approx([3, 3.6, 4, 2.4])
    assert every["standard_error"] == pytest.approx((0.25**2 + 0.35**2 + 0.75**2 + 0.85**2) ** 0.5 / 12**0.5)
    assert overhead_of_rounds(found, rounds=1)["standard_error"] is None


def test_the_middle_of_seconds_is_their_median():
    assert middle_and_least([5.0, 1.0, 2.0]) == {"median": 2.0, "minimum": 1.0}
