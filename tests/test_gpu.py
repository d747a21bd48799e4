"""On a GPU: similarities in half precision, what a step starts, and the trainer against the same on the CPU.

python -m pytest -m gpu
"""

from functools import partial

import pytest
import torch
from torch import nn

from hf_guidance import GuidanceConfig, GuidanceLoss, debiased_cka, linear_cka
from hf_guidance.similarity.layers import gram, layer_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def features(width, offset, dtype, n=256):
    """With a signal that is common to all layers, and a mean of `offset` standard deviations."""
    generator = torch.Generator("cuda").manual_seed(0)
    signal = torch.randn(n, 8, generator=generator, device="cuda")
    x = torch.randn(n, width, generator=generator, device="cuda")
    x += signal @ torch.randn(8, width, generator=generator, device="cuda")
    return (x + offset * torch.randn(width, generator=generator, device="cuda")).to(dtype)


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-4), (torch.float32, 1e-5)])
@pytest.mark.parametrize("offset", [0, 3, 30])
@pytest.mark.parametrize("measure", [linear_cka, debiased_cka])
def test_similarities_are_those_of_float64_on_the_same_features(measure, offset, dtype, close):
    x, y = features(100352 + 7, offset, dtype), features(5000, offset, dtype)
    expected = measure(x.double(), y.double())
    assert 0.1 < expected < 0.999
    assert measure(x, y).item() == pytest.approx(expected.item(), abs=close)
    float32 = x.float(), y.float()
    with torch.autocast("cuda", torch.bfloat16):
        assert measure(*float32).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("offset", [0, 3, 30])
def test_float32_of_a_network_that_computes_in_half_precision_is_multiplied_as_such(offset):
    x = features(100352 + 7, offset, torch.float32)
    exact = gram(x.double())
    with torch.autocast("cuda", torch.bfloat16):
        assert (gram(x) - exact).norm() < 1e-5 * exact.norm()
        residual = layer_of(x, in_region=True).values
    assert 1e-6 < (residual - exact).norm() / exact.norm() < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0, 3, 30])
def test_gradients_are_those_of_float64_on_the_same_features(offset, dtype):
    x, y = features(20000, offset, dtype).requires_grad_(), features(5000, 0, dtype)
    exact = x.detach().double().requires_grad_()
    linear_cka(exact, y.double()).backward()
    (1024 * linear_cka(x, y)).backward()  # as with the scaled loss of float16
    relative = (x.grad.double() / 1024 - exact.grad).norm() / exact.grad.norm()
    assert relative < (2e-2 if dtype != torch.float32 else 1e-4)


def test_a_dead_layer_is_found_in_half_precision():
    x = torch.full((256, 9000), 3.1, device="cuda") + 1e-4 * features(9000, 0, torch.float32)
    for dead in (x.bfloat16(), x.half()):
        assert not gram(dead).any()
    with torch.autocast("cuda", torch.bfloat16):
        assert not layer_of(torch.full_like(x, 3.1), in_region=True).values.any()


def test_one_constant_massive_activation_does_not_make_a_layer_dead():
    x = features(9000, 0, torch.bfloat16)
    expected = gram(x.double())
    x[:, 7] = 9000.0
    assert (gram(x) - expected).norm() < 2e-2 * expected.norm()


def networks():
    """A target of 30 layers and a guide of 10, in which signals neither grow nor vanish."""
    torch.manual_seed(0)
    target = nn.Sequential(*(nn.Sequential(nn.Linear(300, 300), nn.LeakyReLU(0.5, inplace=True)) for _ in range(30)))
    guide = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.LeakyReLU(0.5)) for _ in range(10)))
    for block in target:
        nn.init.orthogonal_(block[0].weight)
    for block in guide:
        nn.init.dirac_(block[0].weight)
        nn.init.normal_(block[0].bias)
    return target, nn.Sequential(nn.Unflatten(1, (3, 10, 10)), *guide)


def losses_and_gradients(device, dtype=None):
    target, guide = (network.to(device) for network in networks())
    config = GuidanceConfig(target_layers=["Linear"], guide_layers=["Conv2d"])
    autocast = partial(torch.autocast, device, dtype, enabled=dtype is not None)
    loss = GuidanceLoss(target, guide, config, autocast=autocast)
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(2):  # the first finds the pairs
        target.zero_grad()
        with loss.watch({"input": x}) as watched, autocast():
            target(watched.inputs["input"])
        watched.loss.backward()
    gradients = [parameter.grad for parameter in target.parameters() if parameter.grad is not None]
    return watched.loss.item(), torch.cat([gradient.flatten() for gradient in gradients]).cpu().double()


@pytest.mark.parametrize(("dtype", "close"), [(None, 1e-3), (torch.bfloat16, 0.25)])
def test_a_guidance_loss_is_that_of_the_cpu(dtype, close):
    (expected, exact), (got, gradient) = losses_and_gradients("cpu"), losses_and_gradients("cuda", dtype)
    assert got == pytest.approx(expected, rel=close / 10)
    assert (gradient - exact).norm() <= close * exact.norm()


def test_a_step_waits_for_nothing():
    target, guide = (network.to("cuda") for network in networks())
    x = torch.randn(64, 300, device="cuda")
    loss = GuidanceLoss(target, guide, GuidanceConfig(target_layers=["Linear"], guide_layers=["Conv2d"]))

    def step():
        with loss.watch({"input": x}, log=False) as watched:
            target(watched.inputs["input"])
        watched.loss.backward()

    step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss.close()
