"""The rules of a proposal, on measurements made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from measured import measurements

from hf_guidance import GuidanceConfig
from hf_guidance.experiments.measurements import Measurements, Spread, StepCost
from hf_guidance.experiments.proposals import DataFacts, Proposal, ordered

ROWS = DataFacts(32)
DEAR = StepCost(1.0, 2.5, 0.2, None, "cpu")


def propose(start: Measurements, data: DataFacts = ROWS, **of_trials: Any) -> Proposal:
    """Propose from measurements, where each other setting measures the same but for the given values."""

    def trial(config: GuidanceConfig) -> Measurements | str:
        return replace(start, config=config, **of_trials)

    return Proposal(start.config, start, data, trial)


def test_without_anything_special_the_defaults_stay_and_each_choice_has_a_sentence() -> None:
    made = propose(measurements())
    assert made.config == GuidanceConfig().resolved()
    assert made.reasons.keys() == {"measure", "sample_axis", "guide_layers", "guidance_weight", "guidance_every"}
    assert all(reason[0].isupper() and reason.endswith(".") for reason in made.reasons.values())
    fields = list(GuidanceConfig.__dataclass_fields__)
    assert [fields.index(name) for name in ordered(made.reasons)] == sorted(map(fields.index, made.reasons))


TOKENS = GuidanceConfig(sample_axis="token")


def test_a_pair_that_is_alike_is_told() -> None:
    start = measurements(ridge=0.95)
    start.pairs[0].similarities["ridge_loo"] = Spread(0.94)
    assert "starts at 0.94 too, the two networks are alike" in propose(start).reasons["measure"]


@pytest.mark.parametrize(
    ("ratio", "given", "weight"),
    [(1.0, 1.0, 1.0), (0.07, 1.0, 1.0), (10.0, 1.0, 1.0), (200.0, 1.0, 0.005), (0.004, 1.0, 200.0), (30.0, 0.2, 0.2)],
)
def test_the_weight_changes_only_where_the_gradients_are_far_apart(ratio: float, given: float, weight: float) -> None:
    found = propose(measurements(GuidanceConfig(guidance_weight=given), ratio=ratio))
    assert found.config.guidance_weight == weight


def test_a_weight_of_zero_becomes_one_and_gradients_that_are_not_measured_are_told() -> None:
    found = propose(measurements(GuidanceConfig(guidance_weight=0), ratio=None))
    assert found.config.guidance_weight == 1.0
    assert "could not be compared (no graph)" in found.reasons["guidance_weight"]


def test_a_guide_that_dominates_runs_on_fewer_rows_or_from_a_cache_or_less_often() -> None:
    tokens = measurements(TOKENS, samples=200, cost=DEAR)
    assert propose(tokens, DataFacts(64, 32)).config.guide_rows == 16
    assert propose(tokens, DataFacts(8, 32)).config.guide_rows is None  # a quarter would have fewer tokens
    assert propose(tokens, DataFacts(8, 32)).config.guidance_every == 3  # (2.5 + 0.2) / 1
    rows = measurements(cost=DEAR)
    cached = propose(rows, DataFacts(64, ids="id", epochs=3.0))
    assert (cached.config.cache_guide, cached.config.sample_id_column) == ("guide_cache", "id")
    assert (cached.config.measure, cached.config.sketch) == ("debiased_cka", 1024)
    assert "over 3.0 epochs" in cached.reasons["cache_guide"]
    for data in (DataFacts(64), DataFacts(64, ids="id", epochs=1.0)):
        assert propose(rows, data).config.guidance_every == 3
        assert propose(rows, data).config.cache_guide is None
    assert propose(measurements(GuidanceConfig(guide_rows=8), cost=DEAR)).config.guidance_every == 1


def test_tokens_are_the_samples_unless_they_cannot_be() -> None:
    start = measurements(GuidanceConfig(measure="ridge_loo"))
    assert propose(start, DataFacts(32, 6)).config.sample_axis == "token"

    def refuse(config: GuidanceConfig) -> str:
        return "the guide has other positions."

    found = Proposal(start.config, start, DataFacts(32, 6), refuse)
    assert found.config.sample_axis == "sequence"
    assert "as tokens cannot be: the guide has other positions." in found.reasons["sample_axis"]


def test_dead_layers_try_other_statistics_and_are_told_if_none_helps() -> None:
    start = measurements(dead=True)
    still = propose(start, DataFacts(32, has_batch_norm=True))
    assert still.config.guide_batch_norm == "eval"
    assert "no other mode revives them" in still.reasons["guide_batch_norm"]
    assert "Every layer of the guide is dead" in still.reasons["guide_layers"]
    revived = propose(start, DataFacts(32, has_batch_norm=True), guides=measurements().guides)
    assert revived.config.guide_batch_norm == "calibrated"


def test_massive_samples_that_are_not_first_are_not_skipped() -> None:
    start = measurements(TOKENS, share=0.8)
    found = propose(start)
    assert found.config.skip_first_positions == 0
    assert "hold up to 80 % of the energy, but not at the start of rows" in found.reasons["skip_first_positions"]
    assert propose(start, guides=measurements(share=0.1).guides).config.skip_first_positions == 1


def test_a_measure_of_the_users_own_stays() -> None:
    start = measurements(GuidanceConfig(measure="somewhere:function"))
    assert propose(start).config.measure == "somewhere:function"
