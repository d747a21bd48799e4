"""Dimensions of sets that are known, and those of another library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_guidance.analysis import intrinsic_dimension


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def curled(samples: int, seed: int = 0) -> Tensor:
    """Make a surface of two dimensions, rolled up in ten."""
    u, v = torch.rand(2, samples, generator=torch.Generator().manual_seed(seed))
    along = 1.5 * math.pi * (1 + 2 * u)
    points = torch.stack([along * along.cos(), 20 * v, along * along.sin()], 1)
    return points @ torch.linalg.qr(noise(10, 10, seed=1))[0][:3]


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_two_nn_finds_the_dimension_of_a_flat_set_in_many_axes(dimension: int) -> None:
    points = torch.rand(2000, dimension, generator=torch.Generator().manual_seed(0)) @ noise(dimension, 30, seed=1)
    points = points.double()
    assert intrinsic_dimension(points) == pytest.approx(dimension, rel=0.1)
    assert intrinsic_dimension(points.reshape(2000, 5, 6) * 1e3 + 7) == pytest.approx(intrinsic_dimension(points))


def test_two_nn_follows_a_surface_where_the_participation_ratio_counts_directions() -> None:
    points = curled(2000)
    assert intrinsic_dimension(points) == pytest.approx(2, rel=0.1)
    assert intrinsic_dimension(points, "participation_ratio") > 2.3


def test_the_participation_ratio_is_that_of_the_variances() -> None:
    points = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))
    points = torch.cat([points, -points])
    assert intrinsic_dimension(points, "participation_ratio") == pytest.approx(3)
    variances = torch.tensor([4.0, 2.0, 1.0])
    points = noise(200_000, 3) * variances.sqrt()
    expected = float(variances.sum() ** 2 / variances.square().sum())
    assert intrinsic_dimension(points, "participation_ratio") == pytest.approx(expected, rel=0.01)
    wide = noise(40, 100)
    centred = (wide - wide.mean(0)).double()
    values = torch.linalg.svdvals(centred) ** 2
    assert intrinsic_dimension(wide, "participation_ratio") == pytest.approx(
        float(values.sum() ** 2 / values.square().sum())
    )


@pytest.mark.parametrize("make", [lambda: noise(300, 4), lambda: curled(300), lambda: noise(300, 40) @ noise(40, 60)])
def test_two_nn_is_that_of_scikit_dimension(make: object) -> None:
    skdim = pytest.importorskip("skdim")
    points = make().double()  # type: ignore[operator]
    expected = skdim.id.TwoNN(discard_fraction=0.1).fit(np.asarray(points)).dimension_
    assert intrinsic_dimension(points) == pytest.approx(expected, rel=1e-6)


def test_equal_samples_have_no_dimension_and_doubles_are_left_out() -> None:
    assert intrinsic_dimension(torch.ones(10, 3)) == 0
    points = torch.cat([curled(1000), curled(1000)[:200]])
    assert intrinsic_dimension(points) == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize(
    ("points", "method", "words"),
    [
        (noise(2, 5), "two_nn", r"features have 2 samples, shape \(2, 5\); at least 3 are needed"),
        (noise(9, 5), "pca", "method is 'pca'; possible are two_nn, participation_ratio"),
        (noise(9, 5).fill_diagonal_(math.nan), "two_nn", "not finite: leave out these samples"),
        (noise(9), "two_nn", r"shape \(9,\) and are torch.float32; expected real numbers \(samples, …\) with two or"),
        (noise(9, 2, 2).to(torch.complex64), "two_nn", "are torch.complex64; expected real numbers"),
        (noise(9, 5).fill_diagonal_(math.inf), "participation_ratio", "not finite: leave out these samples"),
        (torch.arange(40.0)[:, None], "two_nn", "two nearest neighbours at the same distance.*participation_ratio"),
        (torch.linspace(0, 1, 12)[:, None], "two_nn", "most of the 12 samples have two nearest neighbours"),
        ([[1.0, 2.0], [3.0]], "two_nn", r"features \(list\) are no array of numbers .* equally many numbers"),
        ([["a"], ["b"], ["c"]], "two_nn", r"features \(list\) are no array of numbers"),
        (torch.cat([noise(9, 5)] * 2), "two_nn", "18 of 18 samples have a double.*participation_ratio"),
    ],
)
def test_what_has_no_dimension_is_an_error(points: Any, method: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        intrinsic_dimension(points, method)


def test_arrays_lists_and_tensors_with_a_gradient_are_features_too() -> None:
    points = noise(60, 3).double()
    expected = intrinsic_dimension(points)
    for given in (points.numpy(), points.tolist(), points.clone().requires_grad_()):
        assert intrinsic_dimension(given) == pytest.approx(expected)
