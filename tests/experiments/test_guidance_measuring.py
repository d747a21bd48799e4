"""A setting of guidance measured over batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gpt2, gradients, guidance_by_hand, linear, llama, token_batch
from trainers import make_trainer

from hf_guidance import GuidanceConfig
from hf_guidance.experiments.guidance_measuring import measure_guidance, measures_for, penalty_of
from hf_guidance.similarity.registry import MEASURES


def test_similarities_and_gradients_are_those_computed_by_hand(tmp_path: Path) -> None:
    target, guide, batches = gpt2(), llama(), [token_batch(8, seed=i) for i in range(2)]
    trainer = make_trainer(tmp_path, target, guide, guidance_weight=0.5)
    found = measure_guidance(trainer, trainer.guidance, batches)
    ratios, losses = [], []
    for batch in batches:
        guidance = guidance_by_hand(target, guide, batch)
        losses.append(guidance.item())
        slopes = [gradients(target, loss) for loss in (guidance, target(**batch).loss)]
        reached = [i for i, slope in enumerate(slopes[0]) if slope.any()]
        norms = [torch.cat([side[i].flatten() for i in reached]).norm() for side in slopes]
        ratios.append(float(norms[0] / norms[1]))
    means = [pair.similarities["linear_cka"].mean for pair in found.pairs]
    assert sum(1 - value for value in means) == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert found.gradient_ratio is not None
    assert found.gradient_ratio.mean == pytest.approx(sum(ratios) / 2, rel=1e-3)
    assert found.gradient_ratio.deviation == pytest.approx(abs(ratios[0] - ratios[1]) / 2**0.5, rel=1e-2)
    assert (found.batches, found.samples()) == (2, 8)
    assert found.pairs[0].similarities.keys() == set(MEASURES)
    assert min(found.cost.target, found.cost.guide) > 0
    assert (found.cost.memory or 0) > 2**20


def test_every_measure_applies_unless_samples_or_sketch_or_the_users_own_forbid_it() -> None:
    names = [measure.name for measure in measures_for(linear(), 8)]
    assert (names[0], set(names)) == ("linear_cka", set(MEASURES))
    assert "debiased_cka" not in [measure.name for measure in measures_for(linear(), 3)]
    sketched = measures_for(GuidanceConfig(sketch=4), 8)
    assert [measure.name for measure in sketched] == ["debiased_cka", "linear_cka"]
    own = measures_for(GuidanceConfig(measure="similarity.own_measures:total"), 8)
    assert len(own) == 2


def test_ridge_keeps_the_users_penalty_and_leave_one_out_has_that_of_auto() -> None:
    assert penalty_of(GuidanceConfig(measure="ridge", ridge_penalty=0.3), "ridge") == 0.3
    assert penalty_of(GuidanceConfig(measure="ridge", ridge_penalty=0.3), "ridge_loo") == 1.0
    assert penalty_of(GuidanceConfig(sample_axis="token"), "ridge_loo") == 0.1
    assert penalty_of(GuidanceConfig(), "linear_cka") is None


def test_a_batch_that_cannot_be_guided_is_an_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), measure="debiased_cka")
    with pytest.raises(ValueError, match=r"batch 0 cannot be guided: .*2"):
        measure_guidance(trainer, trainer.guidance, [token_batch(2)])
