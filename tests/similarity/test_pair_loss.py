"""Similarities of all pairs and the loss over them, in any mix of forms, against the definition in float64."""

import math

import pytest
import torch
from builders import linear
from torch import nn

from hf_guidance import GuidanceLoss
from hf_guidance.similarity.layers import Layer, layer_of
from hf_guidance.similarity.pair_loss import compare_pairs, guidance_loss, similarities, with_slopes
from hf_guidance.similarity.registry import MEASURES, get_measure

CKA = get_measure("linear_cka")
PAIRS = [("a", "x"), ("a", "y"), ("b", "y"), ("c", "x")]  # layers that are shared, on both sides


def cka(x, y):
    """Straight from the definition, by Gram matrices of features centred by a matrix."""
    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    kernel, other = (h @ z @ z.T @ h for z in (x, y))
    return (kernel * other).sum() / (kernel.norm() * other.norm())


def features(dtype=torch.float64, n=40, offset=0.0):
    torch.manual_seed(0)
    widths = {"a": 5, "b": 16, "c": 1, "x": 7, "y": 3}
    made = {name: (torch.randn(n, d) + offset).to(dtype) for name, d in widths.items()}
    made["x"][:, :3] += made["a"][:, :3]
    return {name: x.requires_grad_(name in "abc") for name, x in made.items()}


def sides(made, primal="abcxy"):
    layers = {name: layer_of(x, primal_below=math.inf if name in primal else 0) for name, x in made.items()}
    return {name: layers[name] for name in "abc"}, {name: layers[name] for name in "xy"}


@pytest.mark.parametrize("primal", ["abcxy", "ab", "x", "acy", ""])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_loss_and_gradients_are_those_of_the_definition(primal, offset, dtype, close):
    made, exact = features(dtype, offset=offset), features(offset=offset)
    loss, values = guidance_loss(PAIRS, CKA, *sides(made, primal))
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


@pytest.mark.parametrize("name", MEASURES)
def test_pairs_share_the_work_of_a_layer_and_nothing_else(name):
    made, plain, measure = features(), features(), get_measure(name)
    loss, values = guidance_loss(PAIRS, measure, *sides(made))
    found = {(t, g): measure(plain[t], plain[g]) for t, g in PAIRS}
    for (t, g), value in found.items():
        assert values[f"{t}~{g}"].item() == pytest.approx(value.item(), abs=1e-9)
    loss.backward()
    sum(1 - value for value in found.values()).backward()
    for layer in "abc":
        torch.testing.assert_close(made[layer].grad, plain[layer].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mean", [False, True])
def test_mean_and_scale(mean):
    made = features()
    loss, values = guidance_loss(PAIRS, CKA, *sides(made), mean=mean, scale=3.0)
    total = sum(1 - value for value in values.values()) / (len(PAIRS) if mean else 1)
    assert loss.item() == pytest.approx(total.item())
    (scaled,) = torch.autograd.grad(loss, made["a"])
    (plain,) = torch.autograd.grad(guidance_loss(PAIRS, CKA, *sides(made), mean=mean)[0], made["a"])
    torch.testing.assert_close(scaled, 3 * plain)


@pytest.mark.parametrize("primal", ["abcxy", "ab", ""])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", ["linear_cka", "ridge_loo"])
def test_each_pair_counts_with_its_weight_and_its_similarity_is_unweighted(primal, mean, name):
    made, plain, measure = features(), features(), get_measure(name)
    weights = [0.5, 3.0, 0.0, 1.0]  # layer a is in two pairs of other weights, b only in one without
    primal = primal if name == "linear_cka" else "abcxy"
    loss, values = guidance_loss(PAIRS, measure, *sides(made, primal), weights=weights, mean=mean)
    found = {
        f"{t}~{g}": cka(plain[t], plain[g]) if name == "linear_cka" else measure(plain[t], plain[g]) for t, g in PAIRS
    }
    expected = 0.5 * (1 - found["a~x"]) + 3 * (1 - found["a~y"]) + (1 - found["c~x"])
    expected = expected / 4.5 if mean else expected
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert {pair: value.item() for pair, value in values.items()} == pytest.approx(
        {pair: value.item() for pair, value in found.items()}, abs=1e-12
    )
    loss.backward()
    expected.backward()
    for layer in "ac":
        torch.testing.assert_close(made[layer].grad, plain[layer].grad, rtol=1e-9, atol=1e-12)
    assert not made["b"].grad.any()


def test_weights_of_one_change_no_bit():
    made = [features(torch.float32), features(torch.float32)]
    losses = [guidance_loss(PAIRS, CKA, *sides(x), weights=w)[0] for x, w in zip(made, (None, [1.0] * 4), strict=True)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert all(torch.equal(made[0][name].grad, made[1][name].grad) for name in "abc")


def test_similarities_have_no_graph():
    found = similarities(PAIRS, CKA, *sides(features()))
    assert list(found) == ["a~x", "a~y", "b~y", "c~x"]
    assert not any(value.requires_grad for value in found.values())


def test_a_value_gets_the_slopes_it_is_given():
    x = torch.randn(4, 2, requires_grad=True)
    value = with_slopes(torch.tensor(5.0), {"a": Layer(x, "primal", 2)}, {"a": torch.full((4, 2), 2.0)}, factor=3.0)
    value.backward()
    assert value.item() == 5
    assert torch.equal(x.grad, torch.full((4, 2), 6.0))


def test_no_slope_changes_the_scale_of_a_layer():
    for primal in ("abcxy", ""):
        targets, guides = sides(features(), primal)
        for measure in MEASURES.values():
            _, slopes = compare_pairs(PAIRS, measure, targets, guides)
            for name, slope in slopes.items():
                assert abs((slope * targets[name].values.detach()).sum()) < 1e-9


def test_a_dead_layer_has_similarity_and_gradient_zero_and_nan_comes_through():
    for primal in ("abcxy", ""):
        made = features(torch.float32)
        with torch.no_grad():
            made["b"][:] = 3.0
        loss, values = guidance_loss(PAIRS, CKA, *sides(made, primal))
        assert values["b~y"] == 0
        loss.backward()
        assert not made["b"].grad.any()
        assert made["a"].grad.any()
        with torch.no_grad():
            made["c"][3] = math.nan
        loss, values = guidance_loss(PAIRS, CKA, *sides(made, primal))
        assert values["c~x"].isnan()
        assert loss.isnan()
        assert values["a~x"].isfinite()


@pytest.mark.parametrize("batch", [8, 200])  # by Gram matrices, and by features
def test_a_guidance_loss_goes_either_way_to_the_same(batch):
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12))
    guide = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9))
    config = linear(target_layers=["Linear"], guide_layers=["Linear"], log_measures=["rsa"])
    rows = torch.randn(batch, 6)
    with GuidanceLoss(target, guide, config).watch({"input": rows}) as watched:
        target(rows)
    watched.loss.backward()
    found = [p.grad.clone() for p in target.parameters()]
    target.zero_grad()
    ours, theirs = ([net[0](rows), net(rows)] for net in (target, guide))
    sum(1 - cka(x.double(), y.double()) for x, y in zip(ours, theirs, strict=True)).backward()
    for p, gradient in zip(target.parameters(), found, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert set(watched.similarities) == {"linear_cka", "rsa"}


@pytest.mark.parametrize("name", ["linear_cka", "debiased_cka"])
@pytest.mark.parametrize(("n", "d"), [(2500, 1000), (2048, 1500)])  # by features, and by Gram matrices
def test_sums_of_a_million_products_lose_no_digits(n, d, name):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss, _ = guidance_loss([("a", "x")], get_measure(name), {"a": layer_of(x)}, {"x": layer_of(x.detach())})
    assert abs(loss.item()) < 2e-6
    loss.backward()
    gradient, x.grad = x.grad, None
    unlike = layer_of(torch.randn(n, d, generator=torch.Generator().manual_seed(1)))
    guidance_loss([("a", "x")], get_measure(name), {"a": layer_of(x)}, {"x": unlike})[0].backward()
    assert gradient.norm() < 1e-4 * x.grad.norm()


@pytest.mark.parametrize("ratio", [0.0, 0.9, 4.0, 15.5])  # energy of the mean to that of the signal
@pytest.mark.parametrize("narrow_guide", [True, False])
def test_a_mean_leaves_the_gradient_of_wide_layers_right(ratio, narrow_guide):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1024, generator=generator)
    mean *= (ratio * 1024) ** 0.5 / mean.norm()
    x, y = (torch.randn(256, 1024, generator=generator) + mean for _ in range(2))
    y = y[:, :40] if narrow_guide else y
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    guidance_loss([("a", "x")], CKA, {"a": layer_of(ours)}, {"x": layer_of(y)})[0].backward()
    (1 - cka(exact, y.double())).backward()
    assert (ours.grad - exact.grad).norm() < 5e-5 * exact.grad.norm()


@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 2.0), (torch.float16, 2.0), (torch.float16, 30.0)])
@pytest.mark.parametrize("scale", [1.0, 1e4])  # 1e4 · 1e4 is beyond float16
def test_half_precision_features_give_what_float64_gives(dtype, offset, scale):
    """Beside the same rounded features in float64, to float32's accuracy; beside unrounded ones, to 2e-2."""
    exact = {name: (x.detach() + offset) * scale / (1 + offset) for name, x in features().items()}
    rounded = {name: x.to(dtype).float().requires_grad_(name in "abc") for name, x in exact.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss, values = guidance_loss(PAIRS, CKA, *sides(rounded))
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


def test_layers_of_other_numbers_of_samples_are_compared_side_by_side():
    torch.manual_seed(0)
    made = {
        name: torch.randn(n, 20, requires_grad=name in "ab") for name, n in {"a": 8, "x": 8, "b": 6, "y": 6}.items()
    }
    layers = {name: layer_of(x) for name, x in made.items()}
    loss, values = guidance_loss([("a", "x"), ("b", "y")], CKA, layers, layers)
    for t, g in (("a", "x"), ("b", "y")):
        assert values[f"{t}~{g}"].item() == pytest.approx(cka(made[t], made[g]).item(), abs=1e-5)
    loss.backward()
    assert made["a"].grad.any()
    assert made["b"].grad.any()


class BesideTheWay(nn.Module):
    """Of four layers of one shape a guide of two leaves two out, of which one is not finite."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 12)
        self.side, self.masked = nn.Linear(12, 12), nn.Identity()

    def forward(self, input):
        first = self.first(input).tanh()
        self.masked(self.side(first).masked_fill(torch.arange(12) > 2, -math.inf))
        return self.last(first)


@pytest.mark.parametrize("batch", [20, 200])  # by Gram matrices, and by features
def test_a_layer_in_no_pair_takes_no_part_in_the_first_step_either(batch):
    target, guide = BesideTheWay(), nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12))
    config = linear(target_layers=["first", "side", "masked", "last"], guide_layers=["Linear"])
    guidance, rows = GuidanceLoss(target, guide, config), torch.randn(batch, 6)
    with guidance.watch({"input": rows}) as watched:
        target(rows)
    assert "masked" not in {name for name, _ in guidance.pairs}
    watched.loss.backward()
    for name, weights in target.named_parameters():
        layer = name.split(".")[0]
        assert (weights.grad is not None) == (layer in {pair[0] for pair in guidance.pairs})
        assert weights.grad is None or weights.grad.isfinite().all()
