"""CKA over a stream of batches, against sums in float64 and against all samples at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_guidance.analysis.hsic_sums import HSICSums
from hf_guidance.similarity import debiased_cka, layer_of, linear_cka

N = 1024


def features(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Layers with a common part, narrow and wide, on a sample; the last one of b is unrelated."""
    random, of_the_networks = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random if shape[0] == N else of_the_networks)

    common = normal(N, 20)
    a = [common @ normal(20, d) + noise * normal(N, d) + 5 for d, noise in ((30, 1.0), (500, 3.0), (3000, 2.0))]
    b = [common @ normal(20, d) + noise * normal(N, d) for d, noise in ((64, 0.1), (2000, 8.0))]
    return a, [*b, normal(N, 800)]


def summed(a: list[Tensor], b: list[Tensor], batch: int) -> HSICSums:
    sums = HSICSums()
    for start in range(0, len(a[0]), batch):
        sums.add(*([layer_of(x[start : start + batch], primal_below=0) for x in side] for side in (a, b)))
    return sums


def hsic(x: Tensor, y: Tensor) -> float:
    """HSIC of a batch without bias, as Song et al. write it, in float64."""
    n, ones = len(x), torch.ones(len(x), dtype=torch.float64)
    k, l = ((z.double() @ z.double().T).fill_diagonal_(0) for z in (x, y))  # noqa: E741
    product = k @ l
    return float(
        (product.trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * ones @ product @ ones / (n - 2))
        / (n * (n - 3))
    )


@pytest.mark.parametrize("batch", [16, 100, 256])
def test_debiased_cka_is_a_sum_over_batches_divided_once(batch: int) -> None:
    a, b = features()
    found = summed(a, b, batch).debiased()[0]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            parts = [slice(start, start + batch) for start in range(0, N, batch)]
            ab, aa, bb = (
                sum(len(left[p]) * hsic(left[p] - left.mean(0), right[p] - right.mean(0)) for p in parts)
                for left, right in ((x, y), (x, x), (y, y))
            )
            assert found[i, j].item() == pytest.approx(ab / (aa * bb) ** 0.5, abs=1e-5)


def test_one_batch_gives_the_measures_themselves() -> None:
    a, b = ([x[:64] for x in side] for side in features())
    sums = summed(a, b, 64)
    for (values, errors), measure in ((sums.linear(), linear_cka), (sums.debiased(), debiased_cka)):
        expected = torch.stack([torch.stack([measure(x.double(), y.double()) for y in b]) for x in a])
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
        assert errors is None


@pytest.mark.parametrize("batch", [16, 64])
def test_small_batches_say_the_same_as_all_samples_within_three_standard_errors(batch: int) -> None:
    a, b = features(1)
    for name, measure in (("linear", linear_cka), ("debiased", debiased_cka)):
        values, errors = getattr(summed(a, b, batch), name)()
        expected = torch.stack([torch.stack([measure(x.double(), y.double()) for y in b]) for x in a])
        assert errors is not None
        assert ((values - expected).abs() <= 3 * errors).all()
        assert (
            errors.max() < 0.03
        )  # so that the test can fail: the biased value of unrelated layers is near 0.8 in batches of 16
    of_batches = [linear_cka(a[2][i : i + 16], b[2][i : i + 16]) for i in range(0, N, 16)]
    assert torch.stack(of_batches).mean() > 0.7 > 0.2 > linear_cka(a[2], b[2])


def test_the_standard_error_is_the_spread_of_other_samples() -> None:
    every = torch.stack([summed(*features(seed), 64).debiased()[0] for seed in range(12)])
    errors = summed(*features(), 64).debiased()[1]
    assert errors is not None
    ratio = errors / every.std(0)
    assert (ratio > 0.4).all()
    assert (ratio < 2.5).all()


def test_a_constant_layer_has_no_similarity_and_memory_does_not_grow() -> None:
    a, b = features()
    a[0] = torch.ones(N, 30)
    sums = summed(a, b, 16)
    values, _ = sums.debiased()
    assert values[0].isnan().all()
    assert not values[1:].isnan().any()
    assert {name: tuple(t.shape) for name, t in sums._sums.items()} == {
        name: tuple(t.shape) for name, t in summed(a, b, 512)._sums.items()
    }
    assert (sums.samples, sums.batches) == (N, N // 16)
