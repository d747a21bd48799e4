"""Centring and scaling in both forms, and which layers are dead."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_guidance.similarity.layers import dual, from_product, gram, halves_of, layer_of, masked, primal

FORMS = {"primal": math.inf, "dual": 0}  # `primal_below` that gives each form


def features(shape: tuple[int, int], seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def masked_features(seed: int, n: int = 32, length: int = 20, d: int = 64) -> Tensor:
    return 1 + torch.randn(n, length, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0, 50.0])
def test_both_forms_and_the_product_are_of_the_same_centred_scaled_features(dtype: torch.dtype, offset: float) -> None:
    x = features((20, 8), 0, offset)
    centred = x - x.mean(0)
    centred *= (20 / centred.square().sum()).sqrt()
    x, close = x.to(dtype), 1e-5 * (1 + offset) if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(primal(x, dtype).values.double(), centred, rtol=0, atol=close)
    for parts in (1, 2):
        halves = halves_of(centred, parts) * parts**0.5
        expected = halves @ halves.mT
        torch.testing.assert_close(dual(x, parts, dtype).values.double(), expected, rtol=0, atol=close)
        if offset < 50:  # beyond, it is left to the others
            product = halves_of(x, parts) @ halves_of(x, parts).mT
            made = from_product(product, dtype, parts)
            torch.testing.assert_close(made.values.double(), expected, rtol=0, atol=10 * close)


def test_masked_features_have_one_more_for_each_position_in_each_part() -> None:
    x, mask = masked_features(0, n=9, length=6, d=3).double(), torch.arange(6) < torch.arange(1, 10)[:, None]
    found, parts, _ = masked(x, mask, torch.float64, None)
    assert (found.shape, parts) == ((9, 6 * 3 + 6), 1)
    found, parts, _ = masked(x, mask, torch.float64, lambda z: z[:, :4])
    assert (found.shape, parts) == ((9, 4 + 2 * 6), 2)


@pytest.mark.parametrize("form", [primal, lambda x, precision: dual(x, 1, precision)])
def test_a_batch_without_samples_or_with_one_is_no_error(form) -> None:
    for x in (torch.zeros(0, 5), torch.zeros(1, 5)):
        assert form(x, x.dtype).values.shape[0] == len(x)


@pytest.mark.parametrize("form", FORMS)
def test_one_column_that_is_large_and_almost_constant_does_not_make_a_bfloat16_layer_dead(form: str) -> None:
    x = features((64, 256)).float()
    x[:, 0] = 2000 + 10 * x[:, 0]
    exact, rounded = (gram(side.double()) for side in (x, x.bfloat16()))
    layer = layer_of(x.bfloat16(), primal_below=FORMS[form])
    assert layer.gram().diagonal().mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(layer.gram().double(), rounded, rtol=0, atol=1e-4)
    assert (rounded * exact).sum() / (rounded.norm() * exact.norm()) > 0.9


def test_one_sample_much_longer_than_the_others_does_not_make_a_layer_dead() -> None:
    mask = torch.arange(1500) < torch.tensor([1500] + [4] * 15)[:, None]
    x = (3 + masked_features(0, n=16, length=1500, d=8)).bfloat16()
    assert gram(x, mask).diagonal().mean().item() == pytest.approx(1)
    dead = torch.full_like(x, 3) * (1 + 2**-7 * (masked_features(1, n=16, length=1500, d=8) > 1))
    assert gram(dead.bfloat16(), mask).count_nonzero() == 0


@pytest.mark.parametrize("masked", [False, True])
def test_one_constant_massive_activation_does_not_make_a_living_bf16_layer_dead(masked: bool) -> None:
    features = torch.randn(16, 8, 64, generator=torch.Generator().manual_seed(0))
    features[:, 0] = 0.0
    features[:, 0, 5] = 2600.0  # what large language models show at their first token
    mask = torch.ones(16, 8, dtype=torch.bool) if masked else None
    kernel = gram(features.bfloat16(), mask)
    assert kernel.diagonal().mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(kernel, gram(features[:, 1:].bfloat16()), atol=1e-5)
