"""Products of features in half precision, as a GPU's tensor cores compute them, on the CPU."""

import math

import pytest
import torch

from hf_guidance import linear_cka
from hf_guidance.similarity import half_precision
from hf_guidance.similarity.layers import gram, layer_of
from hf_guidance.similarity.matrices import center_in_place
from hf_guidance.similarity.pair_loss import guidance_loss
from hf_guidance.similarity.registry import get_measure


@pytest.fixture
def tensor_cores(monkeypatch):
    """As if the CPU had tensor cores for features in half precision."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(half_precision, "for_tensor_cores", lambda x, in_region=False: x.dtype in half_precision.HALF)


def test_a_cpu_has_none():
    assert not half_precision.for_tensor_cores(torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_only_the_gradients_are_rounded(tensor_cores, dtype, rounding, offset, parts):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(12, 30, generator=generator) + offset).to(dtype).requires_grad_()
    y = torch.randn(12, 40, generator=generator)
    y[:, :9] += x.detach()[:, :9]
    exact = x.detach().double().requires_grad_()
    found = []
    for side, other in ((x, y.to(dtype)), (exact, y.to(dtype).double())):
        layers = {"t": layer_of(side, parts=parts)}, {"g": layer_of(other)}
        loss, _ = guidance_loss([("t", "g")], get_measure("linear_cka"), *layers)
        loss.backward()
        found.append(loss)
    assert found[0].item() == pytest.approx(found[1].item(), abs=1e-4)
    assert x.grad.dtype == dtype
    assert (x.grad.double() - exact.grad).abs().max() < 4 * rounding * exact.grad.abs().max()


def test_a_matrix_in_two_halves_lets_no_mean_through():
    torch.manual_seed(0)
    matrix = torch.randn(64, 64).abs()
    matrix = center_in_place(matrix + matrix.T)
    x = (torch.randn(64, 5000) + 30).bfloat16()
    exact = matrix.double() @ x.double()
    rounded = matrix.bfloat16().double() @ x.double()
    got = half_precision.times(matrix, x).double()
    assert (got - exact).abs().max() < 2**-7 * exact.abs().max()
    assert (rounded - exact).mean(1).norm() > 10 * (got - exact).mean(1).norm()


@pytest.mark.parametrize("at_once", [1, 2**26])
@pytest.mark.parametrize("width", [100, 2048, 4096, 5000, 9000])
def test_products_in_pieces_are_those_of_the_whole(width, at_once, monkeypatch):
    monkeypatch.setattr(half_precision, "TOGETHER", at_once)
    x = torch.randn(6, width).bfloat16()
    expected = x.double() @ x.double().T
    torch.testing.assert_close(half_precision.outer(x).double(), expected, rtol=1e-5, atol=1e-3)
    assert half_precision.outer(torch.stack([x, x])).shape == (2, 6, 6)


def test_wide_layers_are_as_those_of_the_definition(tensor_cores):
    torch.manual_seed(0)
    x = (torch.randn(8, 9000) + 3).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    for features, kernel in ((x, gram(x)), (exact, gram(exact))):
        (kernel * torch.arange(64.0).square().view(8, 8)).sum().backward()
        assert features.grad.any()
    torch.testing.assert_close(gram(x).double(), gram(exact), rtol=0, atol=1e-4)
    assert (x.grad.double() - exact.grad).abs().max() < 2**-6 * exact.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_signal_and_one_constant_massive_activation_hides_none(tensor_cores, dtype):
    torch.manual_seed(0)
    constant = (torch.randn(400) + torch.randn(16, 400) * torch.finfo(dtype).eps / 50).to(dtype)
    assert (constant[0] != constant).any()  # a rounding here and there
    next_number = torch.linspace(-3, 7, 400).to(dtype).repeat(16, 1)
    next_number[0] *= 1 + torch.finfo(dtype).eps
    massive = torch.randn(16, 512)
    massive[:, :64] = 0
    massive[:, 5] = 2600  # what large language models show at their first token
    for dead in (constant, next_number):
        assert not gram(dead.to(dtype)).any()
    found, expected = gram(massive.to(dtype)), gram(massive.to(dtype).double()[:, 64:])
    assert (found - expected).norm() < 2e-2 * expected.norm()
    assert found.diagonal().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("scale", "value"), [(2e-20, 1.0), (1e-21, 0.0), (1e-22, 0.0), (1e18, math.nan), (1e20, math.nan)]
)
def test_signals_too_faint_or_too_large_to_be_squared(tensor_cores, scale, value):
    torch.manual_seed(0)
    x = (torch.randn(16, 40) * scale).bfloat16().requires_grad_()
    found = linear_cka(x, x.detach() / scale)
    assert found.item() == pytest.approx(value, abs=2e-2, nan_ok=True)
    found.backward()
    assert x.grad.isfinite().all() == math.isfinite(value)
