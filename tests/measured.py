"""Measurements of guidance made by hand, which the tests of proposals share."""

from __future__ import annotations

from hf_guidance import GuidanceConfig
from hf_guidance.analysis.first_batch import LayerLook
from hf_guidance.experiments.measurements import Measurements, PairMeasurement, Spread, StepCost

CHEAP = StepCost(1.0, 0.5, 0.1, None, "cpu")


def measurements(
    config: GuidanceConfig | None = None,
    *,
    samples: int = 32,
    width: int = 100,
    ridge: float = 0.5,
    ratio: float | None = 1.0,
    cost: StepCost = CHEAP,
    dead: bool = False,
    share: float | None = None,
) -> Measurements:
    """Measurements of one pair."""
    values = {"ridge": ridge, "ridge_loo": 0.1, "debiased_cka": 0.02, "linear_cka": 0.5}
    pair = PairMeasurement("t", "g", {name: Spread(value) for name, value in values.items()})
    target = LayerLook(1, samples, width, "dual", False, None)
    guide = LayerLook(1, samples, 50, "dual", dead, share)
    gradient = None if ratio is None else Spread(ratio)
    own = (config or GuidanceConfig()).resolved()
    return Measurements(own, [pair], {"t": target}, {"g": guide}, gradient, gradient, "no graph", cost, 2)
