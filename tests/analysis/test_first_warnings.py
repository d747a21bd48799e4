"""Warnings about the first batch: each at its limit, with a remedy that fits the settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_guidance import GuidanceConfig
from hf_guidance.analysis.first_batch import FirstLook, LayerLook, PairLook
from hf_guidance.analysis.first_warnings import warnings_of


def look_of(**changes: object) -> FirstLook:
    """A look at four pairs that gives no warning."""
    layer = LayerLook(1, 64, 16, "primal", False, 0.1)
    pairs = [PairLook(f"t{i}", f"g{i}", 0.5, 0.4) for i in range(4)]
    targets, guides = ({f"{side}{i}": layer for i in range(4)} for side in "tg")
    look = FirstLook("linear_cka", "sequence", 1.0, "sum", pairs, targets, guides, 1.0, "", True)
    return replace(look, **changes)


def warned(look: FirstLook, accumulation: int = 1, has_batch_norm: bool = False, **settings: object) -> list[str]:
    config = GuidanceConfig(**settings)  # type: ignore[arg-type]
    return warnings_of(look, config, has_batch_norm=has_batch_norm, accumulation=accumulation)


def test_a_good_start_gives_no_warning() -> None:
    assert warned(look_of(), accumulation=4) == []


@pytest.mark.parametrize(
    ("similarity", "debiased", "count", "full"),
    [
        (0.91, 0.6, 4, True),
        (0.91, 0.62, 4, False),
        (0.89, 0.0, 4, False),
        (0.95, -0.1, 2, True),
        (0.95, -0.1, 1, False),
        (0.95, None, 4, False),
    ],
)
def test_a_measure_is_full_if_half_of_the_pairs_are_far_above_debiased_cka(
    similarity: float, debiased: float | None, count: int, full: bool
) -> None:
    look = look_of()
    look.pairs[:count] = [replace(pair, similarity=similarity, debiased_cka=debiased) for pair in look.pairs[:count]]
    found = warned(look)
    assert bool(found) == full
    if full:
        assert f"linear_cka starts at {similarity:.2f} in {count} of 4 pairs" in found[0]
        assert "Set measure='debiased_cka' or 'ridge_loo', or compare more samples (a larger batch)." in found[0]
        assert "(raise max_tokens)" in warned(replace(look, sample_axis="token"))[0]
        assert warned(replace(look, measure="ridge_loo")) == []
        assert len(warned(replace(look, gradient_ratio=1e-4))) == 1, "the weight is not what is wrong"


COPIED = "in 4 of 4 pairs, because samples that occur more than once hold 80 % of the energy of the guide's layers"


@pytest.mark.parametrize("measure", ["ridge_loo", "debiased_cka"])
def test_copies_of_samples_are_said_to_make_a_measure_full_that_is_never_full_otherwise(measure: str) -> None:
    look = look_of(measure=measure)
    look.pairs[:] = [replace(pair, similarity=0.84, debiased_cka=0.84) for pair in look.pairs]
    assert warned(look) == [], "similar networks are no fault"
    sides = [{n: replace(layer, repeated=0.8) for n, layer in side.items()} for side in (look.targets, look.guides)]
    assert warned(replace(look, guides=sides[1])) == [], "the target tells the copies apart"
    look = replace(look, targets=sides[0], guides=sides[1])
    assert warned(look)[0].startswith(f"{measure} starts at 0.84 {COPIED}")
    assert warned(look)[0].endswith("Leave copies of rows out of the data.")
    tokens = warned(replace(look, sample_axis="token"), skip_first_positions=1)[0]
    assert "leave these out with skip_first_positions=2 or more; if rows are copies" in tokens
    look.pairs[:] = [replace(pair, similarity=0.59) for pair in look.pairs]
    assert warned(look) == []


def test_of_a_measure_that_is_full_by_copies_the_remedy_is_not_another_measure() -> None:
    look = look_of(measure="ridge")
    look.pairs[:] = [replace(pair, similarity=0.95, debiased_cka=0.3) for pair in look.pairs]
    for side in (look.targets, look.guides):
        side |= {name: replace(layer, repeated=0.8) for name, layer in side.items()}
    (words,) = warned(look)
    assert words.startswith(f"ridge starts at 0.95 {COPIED}")
    assert "Set measure" not in words


def dead(*names: str, look: FirstLook | None = None) -> FirstLook:
    look = look or look_of()
    return replace(look, guides=look.guides | {n: replace(look.guides[n], is_dead=True) for n in names})


def test_dead_guide_layers_are_counted_and_named_and_the_remedy_is_one_that_can_help() -> None:
    (words,) = warned(dead("g1", "g3"), has_batch_norm=True)
    assert words.startswith("2 of 4 guide layers are dead: g1, g3. ")
    assert words.endswith(" Set guide_batch_norm='calibrated' or 'batch', or choose other guide_layers.")
    assert warned(dead("g1"))[0].startswith("1 of 4 guide layers is dead: g1. ")
    for settings in ({}, {"has_batch_norm": True, "guide_batch_norm": "batch"}):
        assert warned(dead("g1"), **settings)[0].endswith("stays 0. Choose other guide_layers.")  # type: ignore[arg-type]


def test_at_most_five_layers_are_named() -> None:
    layers = {f"g{i}": LayerLook(1, 64, 16, "primal", True, None) for i in range(7)}
    assert "7 of 7 guide layers are dead: g0, g1, g2, g3, g4 and 2 more." in warned(look_of(guides=layers))[0]


@pytest.mark.parametrize(("axis", "advice"), [("token", "skip_first_positions=1"), ("sequence", "outliers")])
def test_a_layer_whose_energy_is_in_a_few_samples_is_named_with_its_side(axis: str, advice: str) -> None:
    look = look_of(sample_axis=axis)
    look.targets["t2"] = replace(look.targets["t2"], top_share=0.97)
    look.guides["g0"] = replace(look.guides["g0"], top_share=0.5)
    (words,) = warned(look)
    assert "in 1 of 8 layers: target t2 (97 %)." in words
    assert advice in words
    if axis == "token":
        assert "skip_first_positions=3" in warned(look, skip_first_positions=2)[0]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (31.0, "guidance drowns the task. Lower guidance_weight, now 2; at about 0.06 both"),
        (0.009, "guidance has no effect beside the task. Raise guidance_weight, now 2; at about 200 both"),
        (30.0, ""),
        (0.01, ""),
        (0.0, ""),  # as of dead layers, which no weight mends
        (None, ""),
    ],
)
def test_gradients_that_are_far_apart_are_said_with_the_weight_that_mends_it(ratio: float | None, words: str) -> None:
    found = warned(look_of(gradient_ratio=ratio), guidance_weight=2.0)
    assert [words in text for text in found] == [True] * bool(words)


def test_a_task_loss_that_is_summed_over_micro_batches_is_said_with_the_factor() -> None:
    (words,) = warned(look_of(uses_item_count=False), accumulation=8)
    assert "guidance weighs 1/8 as much" in words
    assert "model.accepts_loss_kwargs = False" in words
    assert "multiply guidance_weight by 8" in words
    assert warned(look_of(uses_item_count=False)) == []
    assert warned(look_of(uses_item_count=None), accumulation=8) == []
