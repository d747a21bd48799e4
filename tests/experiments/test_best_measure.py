"""The measure that is chosen from measurements made by hand."""

from __future__ import annotations

import pytest
from measured import measurements

from hf_guidance import GuidanceConfig
from hf_guidance.experiments.best_measure import best_measure
from hf_guidance.experiments.measurements import Measurements

TOKENS = GuidanceConfig(sample_axis="token")


@pytest.mark.parametrize(
    ("found", "measure", "words"),
    [
        (measurements(ridge=0.97), "ridge_loo", "In-sample ridge starts full (0.97) with 32 samples of at most 100"),
        (measurements(samples=400), "ridge_loo", "leave-one-out ridge has served best"),
        (measurements(TOKENS, samples=200), "ridge", "in-sample ridge is not full (0.50)"),
        (measurements(TOKENS, samples=199), "ridge_loo", "has served best in the grid"),
        (measurements(TOKENS, samples=200, ridge=0.95), "ridge_loo", "starts full"),
        (measurements(GuidanceConfig(sketch=64)), "debiased_cka", "There is a sketch"),
    ],
)
def test_the_measure_follows_samples_features_and_what_is_full(found: Measurements, measure: str, words: str) -> None:
    chosen, why = best_measure(found)
    assert chosen == measure
    assert words in why
