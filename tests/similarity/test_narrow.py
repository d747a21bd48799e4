"""Layers of few features: the same similarity and gradient as from Gram matrices, without any of these."""

import math

import pytest
import torch
from torch import nn

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.similarity.grams import gram
from hf_guidance.similarity.measures import get_measure
from hf_guidance.similarity.narrow import Thin, few, is_thin
from hf_guidance.similarity.pair_loss import guidance_loss

CKA = get_measure("linear_cka")
PAIRS = [("a", "x"), ("a", "y"), ("b", "y"), ("c", "x")]  # layers that are shared, on both sides


def cka(x, y):
    """Straight from the definition, by Gram matrices of features centred by a matrix."""
    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    kernel, other = (h @ z @ z.T @ h for z in (x, y))
    return (kernel * other).sum() / (kernel.norm() * other.norm())


def layers(dtype=torch.float64, n=40, offset=0.0):
    torch.manual_seed(0)
    widths = {"a": 5, "b": 16, "c": 1, "x": 7, "y": 3}
    made = {name: (torch.randn(n, d) + offset).to(dtype) for name, d in widths.items()}
    made["x"][:, :3] += made["a"][:, :3]
    return {name: x.requires_grad_(name in "abc") for name, x in made.items()}


def sides(made, thin):
    def kernel(name):
        x = made[name]
        return Thin.apply(x.dtype, x)[0] if name in thin else gram(x)

    return {name: kernel(name) for name in "abc"}, {name: kernel(name).detach() for name in "xy"}


@pytest.mark.parametrize("thin", ["abcxy", "ab", "x", "acy"])
@pytest.mark.parametrize("offset", [0.0, 30.0])  # the second is beyond what is centred in one pass
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_loss_and_gradients_are_those_of_the_definition(thin, offset, dtype, close):
    made, exact = layers(dtype, offset=offset), layers(offset=offset)
    loss, values = guidance_loss(PAIRS, CKA, *sides(made, thin))
    found = {(t, g): cka(exact[t], exact[g]) for t, g in PAIRS}
    expected = sum(1 - value for value in found.values())
    assert loss.item() == pytest.approx(expected.item(), rel=close, abs=close)
    for (t, g), value in found.items():
        assert values[f"{t}~{g}"].item() == pytest.approx(value.item(), rel=close, abs=close)
    loss.backward()
    expected.backward()
    for name in "abc":
        scale = exact[name].grad.abs().max()
        assert (made[name].grad.double() - exact[name].grad).abs().max() < 20 * close * scale


def test_other_measures_take_them_as_gram_matrices():
    for name in ("debiased_cka", "ridge"):
        made, plain, measure = layers(), layers(), get_measure(name)
        loss, values = guidance_loss(PAIRS, measure, *sides(made, "abcxy"))
        found = {(t, g): measure(plain[t], plain[g]) for t, g in PAIRS}
        for (t, g), value in found.items():
            assert values[f"{t}~{g}"].item() == pytest.approx(value.item(), abs=1e-9)
        loss.backward()
        sum(1 - value for value in found.values()).backward()
        for layer in "abc":
            torch.testing.assert_close(made[layer].grad, plain[layer].grad, rtol=1e-9, atol=1e-12)


def test_a_dead_layer_has_similarity_and_gradient_zero_and_nan_comes_through():
    made = layers(torch.float32)
    with torch.no_grad():
        made["b"][:] = 3.0
    loss, values = guidance_loss(PAIRS, CKA, *sides(made, "abcxy"))
    assert values["b~y"] == 0
    loss.backward()
    assert not made["b"].grad.any()
    assert made["a"].grad.any()
    with torch.no_grad():
        made["c"][3] = math.nan
    loss, values = guidance_loss(PAIRS, CKA, *sides(made, "abcxy"))
    assert values["c~x"].isnan()
    assert loss.isnan()
    assert values["a~x"].isfinite()


def test_features_are_few_where_that_costs_less():
    assert few(torch.ones(10, 4))
    assert not few(torch.ones(10, 5))
    assert is_thin(torch.ones(10, 4))
    assert not is_thin(torch.ones(4, 4))


@pytest.mark.parametrize("batch", [8, 200])  # by Gram matrices, and by features
def test_a_guidance_loss_goes_either_way_to_the_same(batch, monkeypatch):
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12))
    guide = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9))
    config = GuidanceConfig(target_layers=["Linear"], guide_layers=["Linear"], log_measures=["rsa"])
    rows = {"inputs": torch.randn(batch, 6)}
    seen, make = [], Thin.apply
    monkeypatch.setattr(Thin, "apply", lambda *args: seen.append(args) or make(*args))
    watching = GuidanceLoss(target, guide, config)
    with watching.watch({"input": rows["inputs"]}) as watched:
        target(rows["inputs"])
    assert len(seen) == (4 if batch == 200 else 0)
    watched.loss.backward()
    found = [p.grad.clone() for p in target.parameters()]
    target.zero_grad()
    ours, theirs = ([net[0](rows["inputs"]), net(rows["inputs"])] for net in (target, guide))
    sum(1 - cka(x.double(), y.double()) for x, y in zip(ours, theirs, strict=True)).backward()
    for p, gradient in zip(target.parameters(), found, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert set(watched.similarities) == {"linear_cka", "rsa"}


@pytest.mark.parametrize(("n", "d"), [(2500, 1000), (2048, 1500)])  # by features, and by Gram matrices
@pytest.mark.parametrize("name", ["linear_cka", "debiased_cka"])
def test_sums_of_a_million_products_lose_no_digits(n, d, name):
    torch.manual_seed(0)
    x = torch.randn(n, d, requires_grad=True)
    kernels = [Thin.apply(z.dtype, z)[0] if few(z) else gram(z) for z in (x, x.detach())]
    loss, _ = guidance_loss([("a", "x")], get_measure(name), {"a": kernels[0]}, {"x": kernels[1]})
    assert abs(loss.item()) < 2e-6
    loss.backward()
    unlike = gram(torch.randn(n, d))
    gradient, x.grad = x.grad, None
    guidance_loss([("a", "x")], get_measure(name), {"a": gram(x)}, {"x": unlike})[0].backward()
    assert gradient.norm() < 1e-4 * x.grad.norm()


@pytest.mark.parametrize("ratio", [0.0, 0.9, 4.0, 15.5])  # energy of the mean to that of the signal
@pytest.mark.parametrize("thin_guide", [True, False])
def test_a_mean_leaves_the_gradient_of_wide_layers_right(ratio, thin_guide):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1024, generator=generator)
    mean *= (ratio * 1024) ** 0.5 / mean.norm()
    x, y = (torch.randn(256, 1024, generator=generator) + mean for _ in range(2))
    y = y[:, :40] if thin_guide else y
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    guide = Thin.apply(y.dtype, y)[0] if thin_guide else gram(y)
    guidance_loss([("a", "x")], CKA, {"a": gram(ours)}, {"x": guide})[0].backward()
    (1 - cka(exact, y.double())).backward()
    assert (ours.grad - exact.grad).norm() < 5e-5 * exact.grad.norm()


@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 2.0), (torch.float16, 2.0), (torch.float16, 30.0)])
@pytest.mark.parametrize("scale", [1.0, 1e4])  # 1e4 · 1e4 is beyond float16
def test_half_precision_features_give_what_float64_gives(dtype, offset, scale):
    """Beside the same rounded features in float64, to float32's accuracy; beside unrounded ones, to 2e-2."""
    exact = {name: (x.detach() + offset) * scale / (1 + offset) for name, x in layers().items()}
    rounded = {name: x.to(dtype).float().requires_grad_(name in "abc") for name, x in exact.items()}
    with torch.autocast("cpu", torch.bfloat16):
        kernels = {name: Thin.apply(dtype, x)[0] for name, x in rounded.items()}
        targets, guides = ({n: kernels[n] for n in names} for names in ("abc", "xy"))
        loss, values = guidance_loss(PAIRS, CKA, targets, guides)
    same = {name: x.detach().double().requires_grad_(name in "abc") for name, x in rounded.items()}
    found = {(t, g): cka(same[t], same[g]) for t, g in PAIRS}
    for (t, g), value in found.items():
        assert values[f"{t}~{g}"].dtype == torch.float32
        assert values[f"{t}~{g}"].item() == pytest.approx(value.item(), abs=1e-5)
        assert values[f"{t}~{g}"].item() == pytest.approx(cka(exact[t], exact[g]).item(), abs=2e-2)
    loss.backward()
    sum(1 - value for value in found.values()).backward()
    for name in "abc":
        assert (rounded[name].grad.double() - same[name].grad).norm() < 1e-4 * same[name].grad.norm()
