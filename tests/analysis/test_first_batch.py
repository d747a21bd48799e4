"""The look at the first batch as data and as text, from layers made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_guidance.analysis.first_batch import (
    FirstLook,
    LayerLook,
    PairLook,
    look_at_layer,
    look_at_pairs,
    render,
)
from hf_guidance.similarity.layers import layer_of
from hf_guidance.similarity.measures import debiased_cka


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def look_of(count: int = 3, **changes: object) -> FirstLook:
    """A look at pairs of layers named by numbers, of similarities 0.50, 0.51, …"""
    layer = LayerLook(1, 64, 16, "primal", False, 0.1)
    names = [str(i) for i in range(count)]
    found = [PairLook(f"t{name}", f"g{name}", 0.5 + i / 100, 0.25) for i, name in enumerate(names)]
    targets, guides = ({side + name: layer for name in names} for side in "tg")
    return replace(FirstLook("ridge", "token", 1.0, "sum", found, targets, guides, gradient_ratio=0.5), **changes)


# --------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(("d", "form"), [(8, "primal"), (400, "dual")])
def test_the_top_samples_share_is_that_of_their_squared_norms(d: int, form: str) -> None:
    x = noise(100, d)
    x[3] *= 30
    x[70] *= 20
    centred = (x - x.mean(0)).double()
    energy = centred.square().sum(1).sort(descending=True).values
    look = look_at_layer([layer_of(x)])
    assert (look.rows, look.samples, look.features, look.form, look.is_dead) == (1, 100, d, form, False)
    assert look.top_share == pytest.approx(float(energy[:2].sum() / energy.sum()), rel=1e-4)


@pytest.mark.parametrize("d", [8, 400])
def test_the_energy_of_samples_with_a_copy_is_found_in_either_form(d: int) -> None:
    x = noise(96, d)
    assert look_at_layer([layer_of(x)]).repeated == 0
    x[::6] = 3 * noise(1, d, seed=1)  # as a first token that all rows of six share
    x[50], x[51] = x[1], x[2] * (1 + 2e-2)  # a copy, and a sample that only resembles another
    energy = (x - x.mean(0)).double().square().sum(1)
    expected = (energy[::6].sum() + energy[[1, 50]].sum()) / energy.sum()
    look = look_at_layer([layer_of(x + 10)])
    assert look.repeated == pytest.approx(float(expected), rel=1e-3)
    assert look_at_layer([layer_of(noise(32, d).repeat(3, 1))]).repeated == pytest.approx(1, rel=1e-5)
    assert look_at_layer([layer_of(noise(32, d).repeat(3, 1), parts=2, primal_below=0)]).repeated == pytest.approx(1)
    assert look_at_layer([layer_of(torch.ones(64, d))]).repeated == 0


def test_few_samples_have_no_share_and_equal_samples_are_dead() -> None:
    assert look_at_layer([layer_of(noise(49, 8))]).top_share is None
    dead = look_at_layer([layer_of(torch.ones(64, 8))])
    assert dead.is_dead
    assert dead.top_share == 0


def test_rows_that_are_compared_by_themselves_are_counted_and_their_shares_averaged() -> None:
    long, short = noise(3, 60, 4), noise(2, 10, 4)
    long[0, 5] *= 1000  # nearly all of the first row
    groups = [layer_of(x, of_rows=True) for x in (short, long)]
    look = look_at_layer(groups)
    assert (look.rows, look.samples, look.features) == (5, 60, 4)
    others = [look_at_layer([layer_of(row)]).top_share or 0 for row in long[1:]]
    assert look.top_share == pytest.approx((1 + sum(others)) / 3, abs=1e-2)


def test_a_sketch_has_the_mean_share_of_its_halves() -> None:
    halves = torch.cat([noise(64, 100), noise(64, 100, seed=1)], 1)
    halves[0] *= 100
    share = look_at_layer([layer_of(halves, parts=2)]).top_share
    assert share == pytest.approx(look_at_layer([layer_of(halves)]).top_share, rel=1e-3)


@pytest.mark.parametrize("known", [False, True])
def test_debiased_cka_stands_beside_the_measure(known: bool) -> None:
    x, y = noise(32, 6), noise(32, 9, seed=1)
    found = {"ridge": {"a~b": torch.tensor(0.7)}}
    if known:
        found["debiased_cka"] = {"a~b": torch.tensor(0.1)}
    (pair,) = look_at_pairs(found, "ridge", {"a": [layer_of(x)]}, {"b": [layer_of(y)]})
    expected = 0.1 if known else float(debiased_cka(x, y))
    assert (pair.target, pair.guide) == ("a", "b")
    assert (pair.similarity, pair.debiased_cka) == (pytest.approx(0.7), pytest.approx(expected, abs=1e-6))


def test_three_samples_have_no_debiased_cka() -> None:
    layers = [layer_of(noise(3, 6))]
    (pair,) = look_at_pairs({"ridge": {"a~b": torch.tensor(0.7)}}, "ridge", {"a": layers}, {"b": layers})
    assert pair.debiased_cka is None


# --------------------------------------------------------------------------------------------------------- the text


def test_a_look_is_written_as_a_table_with_its_settings_and_ratio() -> None:
    text = """
Guidance on the first batch: ridge, sample axis token, weight 1, sum over 2 pairs
  target layer  guide layer  target   guide         form         ridge  debiased_cka
  t0            g0           64 × 16  64 × 16       primal       0.500         0.250
  t1            g1           64 × 16  64 × 16 dead  primal/dual  0.510         0.250
  gradient of guidance over that of the task, in the weights that it reaches: 0.5
"""
    look = look_of(2)
    look.guides["g1"] = replace(look.guides["g1"], form="dual", is_dead=True)
    assert render(look) == text.strip("\n")


def test_of_many_pairs_the_first_and_last_are_shown_and_the_rest_counted() -> None:
    lines = render(look_of(48)).splitlines()
    names = [line.split()[0] for line in lines[2:-1]]
    assert names == [*(f"t{i}" for i in range(6)), "…", *(f"t{i}" for i in range(42, 48))]
    assert lines[8] == "  … 36 more pairs: 0.560 to 0.910"
    assert "…" not in render(look_of(12))
    assert "  … 1 more pair: 0.560 to 0.560" in render(look_of(13)).splitlines()


def test_debiased_cka_is_written_once_and_only_where_it_is_known() -> None:
    assert render(look_of(measure="debiased_cka")).count("debiased_cka") == 2
    pairs = [replace(pair, debiased_cka=None) for pair in look_of().pairs]
    assert "debiased_cka" not in render(look_of(pairs=pairs))


def test_what_was_not_measured_is_said_and_the_rows_of_the_axis_within_are_counted() -> None:
    text = render(look_of(1, gradient_ratio=None, not_measured="FSDP", sample_axis="within"))
    assert text.endswith(": not measured (FSDP)")
    assert "sample axis within, weight 1, sum over 1 pair\n" in text
    many = look_of(1, sample_axis="within")
    many.targets["t0"] = replace(many.targets["t0"], rows=8)
    assert "sample axis within 8 rows, weight 1" in render(many)
