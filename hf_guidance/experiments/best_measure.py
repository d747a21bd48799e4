"""The measure that fits what was measured, by the grid of measures in recipes/LOG.md."""

from __future__ import annotations

from hf_guidance.analysis.first_warnings import FULL
from hf_guidance.experiments.measurements import Measurements

OF_SKETCHES = "of the measures that take one it alone is near 0 for unrelated layers"


def best_measure(found: Measurements) -> tuple[str, str]:
    """Choose a measure by sample axis, numbers of samples and features, and what in-sample ridge starts at.

    Returns:
        Name of the measure, and why, in words without a full stop.

    Source: the grid of measures in recipes/LOG.md.
    """
    if found.config.sketch is not None:
        return "debiased_cka", f"There is a sketch, and {OF_SKETCHES}"
    samples, width = found.samples(), found.width()
    ridge, loo, debiased = (found.mean(name) for name in ("ridge", "ridge_loo", "debiased_cka"))
    of = f"{samples} samples of at most {width} features"
    if ridge is not None and ridge >= FULL:
        beside = f"leave-one-out is {_number(loo)}, debiased CKA {_number(debiased)}"
        return "ridge_loo", f"In-sample ridge starts full ({ridge:.2f}) with {of}, where {beside}"
    if found.config.sample_axis == "token" and 2 * width <= samples and ridge is not None:
        beside = "best for copy-paste in the grid of measures, and near leave-one-out for language"
        return "ridge", f"With {of} in-sample ridge is not full ({ridge:.2f}); it was {beside}"
    return "ridge_loo", f"With {of} leave-one-out ridge has served best in the grid of measures ({_number(loo)} here)"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
