"""Measurements as plain data."""

from __future__ import annotations

import pytest
from test_proposals import measurements

from hf_guidance import GuidanceConfig
from hf_guidance.experiments.measurements import PairMeasurement, Spread, StepCost, spread_of


def test_a_spread_is_mean_and_sample_deviation() -> None:
    assert spread_of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert spread_of([4.0]) == Spread(4.0, None)


def test_the_room_of_a_pair_is_one_minus_its_similarity() -> None:
    assert PairMeasurement("t", "g", {"ridge": Spread(0.75)}).room("ridge") == 0.25


def test_the_guide_has_its_share_of_a_step() -> None:
    assert StepCost(1.0, 2.0, 1.0, None, "cpu").guide_share() == 0.5
    assert StepCost(0.0, 0.0, 0.0, None, "cpu").guide_share() == 0.0


def test_the_mean_leaves_dead_pairs_out_while_others_live() -> None:
    found = measurements()
    assert found.mean("ridge") == pytest.approx(0.5)
    assert found.mean("rsa") is None
    found.targets["dead"] = measurements(dead=True).guides["g"]
    found.pairs.append(PairMeasurement("dead", "g", {"ridge": Spread(0.0)}))
    assert found.mean("ridge") == pytest.approx(0.5)
    assert measurements(dead=True).mean("ridge") == pytest.approx(0.5)
    assert measurements(dead=True).dead() == ["g"]
    assert (found.samples(), found.width()) == (32, 100)
    assert found.samples_in_words() == "32 samples a batch"
    assert measurements(GuidanceConfig(sample_axis="within")).samples_in_words() == "32 samples a row"
