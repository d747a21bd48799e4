"""Procrustes: features keep what a Gram matrix loses."""

from __future__ import annotations

import torch

from hf_guidance import procrustes
from hf_guidance.similarity.layers import layer_of
from hf_guidance.similarity.pair_loss import similarities
from hf_guidance.similarity.registry import get_measure
from hf_guidance.similarity.rotation import Rotation


def test_a_steep_spectrum_keeps_its_digits_as_features_and_loses_some_as_a_gram_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 65, dtype=torch.float64) ** -2
    x = torch.randn(96, 64, generator=generator, dtype=torch.float64) * scale
    y = torch.randn(96, 64, generator=generator, dtype=torch.float64) * scale
    exact = procrustes(x, y).item()
    assert abs(procrustes(x.float(), y.float()).item() - exact) < 1e-5
    gram = [{"": layer_of(side.float(), primal_below=0)} for side in (x, y)]
    (lossy,) = similarities([("", "")], get_measure("procrustes"), *gram).values()
    assert 1e-5 < abs(lossy.item() - exact) < 1e-2  # as its docstring says


def test_two_layers_that_differ_by_a_rotation_are_the_same() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    assert abs(procrustes(x, x @ rotation).item() - 1) < 1e-6


def test_the_slope_of_a_rotation_of_the_guide_is_zero_as_there_is_nothing_to_gain() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    for below in (0, 9):
        target, guide = (layer_of(side, primal_below=below) for side in (x, x @ rotation))
        method = Rotation()
        value, slope = method.compare(method.prepare(target, True), method.prepare(guide, False))
        assert abs(value.item() - 1) < 1e-9
        assert slope is not None
        in_features = slope if target.form == "primal" else slope @ (x - x.mean(0))
        assert in_features.abs().max() < 1e-9
