"""CKA over a stream of batches, against sums in float64 and against all samples at once."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from hf_guidance.analysis import hsic_sums
from hf_guidance.analysis.hsic_sums import Between, HSICSums
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


def tokens_of_rows(rows: int, of_network: int, seed: int = 0) -> Tensor:
    """Tokens of rows of 3 to 6, alike within a row: the same of one row, others of each network."""
    lengths = torch.randint(3, 7, (rows,), generator=torch.Generator().manual_seed(seed))
    random, weights = torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(of_network)
    of_rows = torch.randn(rows, 8, generator=random).repeat_interleave(lengths, 0)
    own = torch.randn(int(lengths.sum()), 8, generator=random)
    return torch.cat([2 * of_rows, own], 1) @ torch.randn(16, 24, generator=weights)


def rows_of(rows: int, seed: int = 0) -> Tensor:
    lengths = torch.randint(3, 7, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(rows).repeat_interleave(lengths)


def test_hsic_of_tokens_is_the_mean_over_all_tuples_of_different_rows() -> None:
    row_of, x, y = rows_of(5), *(tokens_of_rows(5, of)[:, :2].double() for of in (1, 2))
    layers = [layer_of(z, primal_below=0) for z in (x, y)]
    k, l = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))  # noqa: E741
    means = []
    for size, value in (
        (2, lambda i, j: k[i, j] * l[i, j]),
        (4, lambda i, j, g, h: k[i, j] * l[g, h]),
        (3, lambda i, j, g: k[i, j] * l[i, g]),
    ):
        tuples = [t for t in permutations(range(len(row_of)), size) if len(set(row_of[list(t)].tolist())) == size]
        means.append(torch.stack([value(*t) for t in tuples]).mean())
    expected = means[0] + means[1] - 2 * means[2]
    between = Between(row_of)
    grams = [hsic_sums._unscaled(layer)[None] for layer in layers]
    found = (between.sums(grams[0]) * between.factors * between.sums(grams[1])).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_samples_with_a_row_each_have_one_hsic_in_both_ways() -> None:
    a, b = features()
    layers = [[layer_of(x[:32], primal_below=0) for x in side] for side in (a, b)]
    sums, of_rows = HSICSums(), HSICSums()
    sums.add(*layers)
    of_rows.add(*layers, torch.randperm(32))
    torch.testing.assert_close(of_rows.debiased()[0], sums.debiased()[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_tokens_say_the_same_in_batches_of_few_rows(batch: int) -> None:
    rows = 512
    row_of, x, y = rows_of(rows), tokens_of_rows(rows, 1), tokens_of_rows(rows, 2)
    sums, alike = HSICSums(), HSICSums()
    for start in range(0, rows, batch):
        own = (row_of >= start) & (row_of < start + batch)
        layers = [[layer_of(z[own], primal_below=0)] for z in (x, y)]
        sums.add(*layers, row_of[own])
        alike.add(*layers)
    for name, measure in (("debiased", debiased_cka), ("linear", linear_cka)):
        values, errors = getattr(sums, name)()
        whole = float(measure(x.double(), y.double()))
        assert errors is not None
        assert abs(float(values) - whole) <= 3 * float(errors)
        if batch == 4:
            values, errors = getattr(alike, name)()
            assert abs(float(values) - whole) > 3 * float(errors), "the test could fail"
