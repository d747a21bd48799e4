"""Ridge regression, in-sample and leave-one-out: closed forms against fits, and what they multiply."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_guidance import ridge, ridge_loo
from hf_guidance.similarity.layers import layer_of
from hf_guidance.similarity.regression import Ridge


def features(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("widths", [(5, 4), (40, 30)])
def test_each_sample_is_predicted_from_the_others(penalty: float, widths: tuple[int, int]) -> None:
    n = 20
    x, y = features(n, widths[0]), features(n, widths[1], 1)
    y[:, :3] += 2 * x[:, :3]
    weight = penalty * (x - x.mean(0)).square().sum() / n
    errors = spread = 0.0
    for i in range(n):
        others = torch.arange(n) != i
        a, b = x[others], y[others]
        centre, middle = a.mean(0), b.mean(0)
        a, b = a - centre, b - middle
        slope = torch.linalg.solve(a.T @ a + weight * torch.eye(x.shape[1], dtype=x.dtype), a.T @ b)
        errors += (y[i] - middle - (x[i] - centre) @ slope).square().sum().item()
        spread += (y[i] - middle).square().sum().item()
    assert ridge_loo(x, y, penalty).item() == pytest.approx(1 - errors / spread, abs=1e-12)


def test_in_sample_r2_is_full_where_features_outnumber_samples_and_leave_one_out_is_not() -> None:
    for n, full in ((32, 0.99), (512, 0.98)):
        x, y = features(n, 2048), features(n, 2048, 1)
        assert ridge(x, y).item() > full
        assert ridge_loo(x, y).item() == pytest.approx(-0.1, abs=0.15)


def test_penalties_of_unrelated_features_are_in_the_documented_range() -> None:
    x, y = features(256, 100), features(256, 100, 1)
    assert -0.35 < ridge_loo(x, y).item() < -0.1
    assert -1.3 < ridge_loo(x, y, 0.1).item() < -0.4


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("guide_width", [16, 200])
def test_of_features_nothing_is_larger_than_samples_times_features_squared(
    leave_one_out: bool, guide_width: int
) -> None:
    n, d = 300, 16
    ridge = Ridge(1.0, leave_one_out)
    target, guide = layer_of(features(n, d)), layer_of(features(n, guide_width, 1), primal_below=1)
    with FlopCounterMode(display=False) as counter:
        ridge.compare(ridge.prepare(target, True), ridge.prepare(guide, False))
    products = 6 * 2 * n * d * guide_width + 5 * 2 * n * d * d
    assert counter.get_total_flops() <= products + 2 * 2 * d * d * guide_width


@pytest.mark.parametrize("n", [64, 1024])
@pytest.mark.parametrize("name", ["ridge", "ridge_loo"])
def test_two_samples_with_all_of_the_energy_leave_two_digits_in_float32(name: str, n: int) -> None:
    x, y = features(n, 16), features(n, 16, 1)
    y += x
    x[:2] *= 100
    function = {"ridge": ridge, "ridge_loo": ridge_loo}[name]
    assert function(x.float(), y.float()).item() == pytest.approx(function(x, y).item(), rel=3e-3)


@pytest.mark.parametrize(("count", "size"), [(16, 30), (4, 100), (1, 1000)])
@pytest.mark.parametrize("name", ["ridge", "ridge_loo"])
def test_large_first_tokens_leave_the_gradient_right_in_float32(name: str, count: int, size: int) -> None:
    x, y = features(1024, 64), features(1024, 48, 1)
    y[:, :10] += x[:, :10]
    x[:count] += size * features(1, 64, 2)  # as language models show at the first tokens of their rows
    function = {"ridge": ridge, "ridge_loo": ridge_loo}[name]
    found = []
    for dtype in (torch.float64, torch.float32):
        side = x.to(dtype, copy=True).requires_grad_()
        value = function(side, y.to(dtype))
        value.backward()
        found.append((value.item(), side.grad.double()))
    (exact, expected), (value, gradient) = found
    assert value == pytest.approx(exact, abs=1e-5 if name == "ridge" else 1e-2)
    assert (gradient - expected).norm() < (5e-3 if name == "ridge" else 5e-2) * expected.norm()


def test_a_penalty_is_above_0_and_what_cannot_be_inverted_is_no_number() -> None:
    x, y = features(8, 5), features(8, 3, 1)
    for penalty in (0, -1, float("nan")):
        for function in (ridge, ridge_loo):
            with pytest.raises(ValueError, match=rf"penalty is {penalty}; it must be a finite number above 0"):
                function(x, y, penalty)
    assert ridge(torch.full((8, 5), torch.nan), y).isnan()
