"""Cosines of kernels: what is multiplied in each form, and what the kernels are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_guidance.similarity.cosines import Cosine, off_diagonal_cosines, rbf
from hf_guidance.similarity.layers import Layer, gram, layer_of


def features(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def operations(debiased: bool, target: Layer, guide: Layer) -> int:
    cosine = Cosine(debiased)
    with FlopCounterMode(display=False) as counter:
        cosine.compare(cosine.prepare(target, True), cosine.prepare(guide, False))
    return counter.get_total_flops()


@pytest.mark.parametrize("widths", [(8, 8), (8, 90), (90, 8), (90, 90)])
def test_debiased_cka_makes_no_product_that_linear_cka_does_not(widths: tuple[int, int]) -> None:
    target, guide = (layer_of(features(64, d, d)) for d in widths)
    assert operations(True, target, guide) == operations(False, target, guide)


@pytest.mark.parametrize("debiased", [False, True])
def test_features_make_no_matrix_of_samples_by_samples(debiased: bool) -> None:
    n, d = 200, 20
    target, guide = (layer_of(features(n, d, seed)) for seed in (0, 1))
    assert operations(debiased, target, guide) == 5 * 2 * n * d * d  # of a pair, and of the two norms


@pytest.mark.parametrize("debiased", [False, True])
def test_a_side_has_the_same_norm_in_either_form(debiased: bool) -> None:
    x = features(20, 6)
    norms = [
        Cosine(debiased).prepare(layer_of(x, primal_below=below), slope).inverse.item()
        for below in (0, 9)
        for slope in (False, True)
    ]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-12)


def test_the_bandwidth_of_rbf_is_the_mean_squared_distance() -> None:
    x = features(15, 4).numpy()
    distance = pdist(x) ** 2
    kernel = np.eye(15)
    kernel[np.triu_indices(15, 1)] = np.exp(-distance / (2 * distance.mean()))
    kernel = np.maximum(kernel, kernel.T)
    h = np.eye(15) - 1 / 15
    np.testing.assert_allclose(rbf(gram(torch.from_numpy(x))).numpy(), h @ kernel @ h, atol=1e-12)


def test_cosines_have_no_diagonal_and_no_mean() -> None:
    x = features(15, 4)
    x = x - x.mean(0)
    found = off_diagonal_cosines(gram(x))
    assert found.diagonal().count_nonzero() == 0
    assert abs(found.sum()) < 1e-10
    unit = x / x.norm(dim=1, keepdim=True)
    assert (found[0, 1] - found[2, 3]).item() == pytest.approx((unit[0] @ unit[1] - unit[2] @ unit[3]).item())


@pytest.mark.parametrize("primal_below", [0.0, 9.0], ids=["dual", "primal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("n", [5, 40, 400, 2000])
def test_debiased_a_sample_apart_from_equal_ones_carries_no_signal(
    n: int, parts: int, dtype: torch.dtype, primal_below: float
) -> None:
    x = features(1, 2).repeat(n, 1).to(dtype)  # U-centring leaves nothing of the kernel of such samples
    x[0] += 1
    side = Cosine(debiased=True).prepare(layer_of(x, primal_below=primal_below, parts=parts), True)
    assert side.inverse == 0
    like = Cosine(debiased=True).prepare(layer_of(features(n, 2).to(dtype), primal_below=primal_below), False)
    value, slope = Cosine(debiased=True).compare(side, like)
    assert value == 0
    assert slope is not None
    assert not slope.any()
