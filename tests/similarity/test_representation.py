"""Many small layers at once, and products of half precision: the same similarities and gradients as one by one."""

import math

import pytest
import torch
from builders import gpt2, token_batch
from torch import nn

from hf_guidance import GuidanceConfig, GuidanceLoss, linear_cka
from hf_guidance.similarity import grams, half_precision, narrow, pair_loss, representation
from hf_guidance.similarity.grams import gram
from hf_guidance.similarity.matrices import center
from hf_guidance.similarity.measures import MEASURES, get_measure
from hf_guidance.similarity.pair_loss import guidance_loss
from hf_guidance.similarity.representation import Later, complete, later

CKA = get_measure("linear_cka")
PAIRS = [("a", "x"), ("a", "y"), ("b", "y"), ("c", "x")]  # layers that are shared, on both sides


@pytest.fixture
def slow_starts(monkeypatch):
    """As if the CPU were a device that work is started on from elsewhere."""
    for module in (representation, pair_loss):
        monkeypatch.setattr(module, "starts_slowly", lambda x, thin=False: True)
    monkeypatch.setattr(narrow, "in_one_stack", lambda x: True)


@pytest.fixture
def tensor_cores(monkeypatch):
    """As if the CPU had tensor cores for features in half precision."""
    for module in (representation, grams):
        monkeypatch.setattr(module, "for_tensor_cores", lambda x, in_region=False: x.dtype in half_precision.HALF)


def cka(x, y):
    """Straight from the definition, by Gram matrices of features centred by a matrix."""
    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    kernel, other = (h @ z @ z.T @ h for z in (x, y))
    return (kernel * other).sum() / (kernel.norm() * other.norm())


WIDE = {"a": 30, "b": 30, "c": 17, "x": 40, "y": 40}  # two of one shape, and one of its own
FEW = {"a": 5, "b": 5, "c": 3, "x": 7, "y": 7}


def layers(dtype, n=12, offset=0.0, widths=WIDE):
    torch.manual_seed(0)
    made = {name: (torch.randn(n, d) + offset).to(dtype) for name, d in widths.items()}
    shared = min(9, widths["a"])
    made["x"][:, :shared] += made["a"][:, :shared]
    return {name: x.requires_grad_(name in "abc") for name, x in made.items()}


def of(made, names, thin=False):
    return complete({name: later(made[name], made[name].dtype, thin=thin) for name in names})


def check_against_the_definition(dtype, close, close_gradient, offset=0.0, few=False):
    made = layers(dtype, n=200, offset=offset, widths=FEW) if few else layers(dtype, offset=offset)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in made.items()}
    targets, guides = of(made, "abc", few), of(made, "xy", few)
    assert all(map(narrow.is_thin, (*targets.values(), *guides.values()))) == few
    loss, values = guidance_loss(PAIRS, CKA, targets, guides)
    found = {(t, g): cka(exact[t], exact[g]) for t, g in PAIRS}
    expected = sum(1 - value for value in found.values())
    assert loss.item() == pytest.approx(expected.item(), abs=close)
    for (t, g), value in found.items():
        assert values[f"{t}~{g}"].item() == pytest.approx(value.item(), abs=close)
    (3 * loss).backward()
    (3 * expected).backward()
    for name in "abc":
        assert made[name].grad.dtype == dtype
        difference = made[name].grad.double() - exact[name].grad
        assert difference.abs().max() < close_gradient * exact[name].grad.abs().max()


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_loss_and_gradients_are_those_of_the_definition(slow_starts, dtype, close, offset):
    check_against_the_definition(dtype, close, 30 * close, offset)


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_in_half_precision_only_the_gradients_are_rounded(slow_starts, tensor_cores, dtype, rounding, offset):
    check_against_the_definition(dtype, 1e-4, 4 * rounding, offset)


def test_a_matrix_in_two_halves_lets_no_mean_through():
    torch.manual_seed(0)
    matrix = center(torch.randn(64, 64).abs())
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


def test_wide_layers_in_half_precision_are_as_those_of_the_definition(tensor_cores):
    torch.manual_seed(0)
    x = (torch.randn(8, 9000) + 3).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    for features, kernel in ((x, gram(x)), (exact, gram(exact))):
        (kernel * torch.arange(64.0).square().view(8, 8)).sum().backward()
        assert features.grad.any()
    torch.testing.assert_close(gram(x).double(), gram(exact), rtol=0, atol=1e-4)
    assert (x.grad.double() - exact.grad).abs().max() < 2**-6 * exact.grad.abs().max()


def test_a_dead_layer_has_similarity_and_gradient_zero_and_nan_comes_through(slow_starts, tensor_cores):
    for dtype in (torch.float32, torch.bfloat16):
        made = layers(dtype)
        with torch.no_grad():
            made["b"][:] = 3.0
        loss, values = guidance_loss(PAIRS, CKA, of(made, "abc"), of(made, "xy"))
        assert values["b~y"] == 0
        loss.backward()
        assert not made["b"].grad.any()
        assert made["a"].grad.any()
        with torch.no_grad():
            made["c"][3] = math.nan
        loss, values = guidance_loss(PAIRS, CKA, of(made, "abc"), of(made, "xy"))
        assert values["c~x"].isnan()
        assert loss.isnan()
        assert values["a~x"].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_signal_and_one_constant_massive_activation_hides_none(slow_starts, tensor_cores, dtype):
    torch.manual_seed(0)
    constant = (torch.randn(400) + torch.randn(16, 400) * torch.finfo(dtype).eps / 50).to(dtype)
    assert (constant[0] != constant).any()  # a rounding here and there
    next_number = torch.linspace(-3, 7, 400).to(dtype).repeat(16, 1)
    next_number[torch.rand(16, 400) < 0.5] *= 1 + torch.finfo(dtype).eps
    massive = torch.randn(16, 8 * 64)
    massive[:, :64] = 0
    massive[:, 5] = 2600  # what large language models show at their first token
    features = {"constant": constant, "next number": next_number, "massive": massive}
    found = complete({name: later(x.to(dtype), dtype) for name, x in features.items()})
    assert not found["constant"].any()
    assert not found["next number"].any()
    expected = gram(massive.to(dtype).double()[:, 64:])
    assert (found["massive"] - expected).norm() < 2e-2 * expected.norm()
    assert found["massive"].diagonal().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_signals_too_faint_or_too_large_to_be_squared(slow_starts, tensor_cores, half):
    dtype = torch.bfloat16 if half else torch.float32
    # the last of 50 layers without biases has activations of some 1e-20
    for scale, value in ((2e-20, 1.0), (1e-21, 0.0), (1e-22, 0.0), (1e18, math.nan), (1e20, math.nan)):
        torch.manual_seed(0)
        x = (torch.randn(16, 40) * scale).to(dtype).requires_grad_()
        loss, values = guidance_loss(
            [("x", "y")], CKA, complete({"x": later(x, dtype)}), complete({"y": later(x.detach() / scale, dtype)})
        )
        assert values["x~y"].item() == pytest.approx(value, abs=2e-2, nan_ok=True)
        assert linear_cka(x, x.detach() / scale).item() == pytest.approx(value, abs=2e-2, nan_ok=True)
        loss.backward()
        assert x.grad.isfinite().all() == math.isfinite(value)


def test_a_batch_without_samples_ends_in_none(slow_starts, tensor_cores):
    for x in (torch.zeros(0, 5), torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5000).bfloat16()):
        assert complete({"x": later(x, x.dtype)})["x"].shape == (0, 0)


def test_few_features_stand_for_a_large_gram_matrix_here_too(slow_starts, tensor_cores):
    n = math.isqrt(representation.SMALL_THIN // 4)
    for x in (torch.randn(n + 1, 20, requires_grad=True), torch.randn(n + 1, 20).bfloat16()):
        assert later(x, x.dtype, thin=True).thin
        assert not later(x[:n], x.dtype, thin=True).thin
        assert not later(x, x.dtype).thin
    assert later(torch.randn(representation.SMALL_CONSTANT // 80 + 1, 20), torch.float32, thin=True) is None


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize(
    ("dtype", "close", "gradient"), [(torch.float64, 1e-12, 3e-11), (torch.float32, 2e-5, 4e-4), ("half", 1e-4, 1e-2)]
)
def test_few_features_of_several_layers_are_those_of_the_definition(
    stacked, offset, dtype, close, gradient, monkeypatch
):
    monkeypatch.setattr(narrow, "in_one_stack", lambda x: stacked)
    monkeypatch.setattr(representation, "SMALL_THIN", 0)
    check_against_the_definition(torch.bfloat16 if dtype == "half" else dtype, close, gradient, offset, few=True)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_dead_layer_and_one_that_is_not_finite_leave_the_others_as_they_are(stacked, monkeypatch):
    monkeypatch.setattr(narrow, "in_one_stack", lambda x: stacked)
    monkeypatch.setattr(representation, "SMALL_THIN", 0)
    found = []
    for broken in (False, True):
        made = layers(torch.float32, n=200, widths={**FEW, "c": 5})
        if broken:
            made["b"].data.fill_(3.0)
            made["c"].data[3] = math.nan
        loss, values = guidance_loss(PAIRS, CKA, of(made, "abc", thin=True), of(made, "xy", thin=True))
        loss.backward()
        found.append((values, made))
    (whole, ours), (values, theirs) = found
    for pair in ("a~x", "a~y"):
        torch.testing.assert_close(values[pair], whole[pair])
    torch.testing.assert_close(theirs["a"].grad, ours["a"].grad)
    assert values["b~y"] == 0
    assert not theirs["b"].grad.any()
    assert values["c~x"].isnan()


def test_constant_features_are_kept_if_they_are_fewer(slow_starts):
    x = torch.randn(8, representation.SMALL_CONSTANT // 32 + 1)
    assert later(x, x.dtype) is None
    assert later(x.requires_grad_(), x.dtype) is not None


def test_layers_of_other_numbers_of_samples_are_compared_side_by_side(slow_starts):
    torch.manual_seed(0)
    made = {
        name: torch.randn(n, 20, requires_grad=name in "ab") for name, n in {"a": 8, "x": 8, "b": 6, "y": 6}.items()
    }
    loss, values = guidance_loss([("a", "x"), ("b", "y")], CKA, of(made, "ab"), of(made, "xy"))
    for t, g in (("a", "x"), ("b", "y")):
        assert values[f"{t}~{g}"].item() == pytest.approx(cka(made[t], made[g]).item(), abs=1e-5)
    loss.backward()
    assert made["a"].grad.any()
    assert made["b"].grad.any()


def test_every_measure_takes_them(slow_starts):
    made = layers(torch.float64)
    for measure in MEASURES.values():
        loss, values = guidance_loss(PAIRS, measure, of(made, "abc"), of(made, "xy"))
        for t, g in PAIRS:
            assert values[f"{t}~{g}"].item() == pytest.approx(measure(made[t], made[g]).item(), abs=1e-9)
        loss.backward()


def test_layers_are_left_for_later_where_that_is_cheaper(monkeypatch, tensor_cores):
    small, larger = torch.randn(8, 20), torch.randn(8, representation.SMALL_ON_CPU // 32 + 1)
    for x in (small, larger):  # on a CPU
        assert (later(x, x.dtype) is None) == (x is larger)
    assert later(torch.randn(math.isqrt(representation.SMALL_ON_CPU // 4) + 1, 2), torch.float32) is None
    monkeypatch.setattr(representation, "starts_slowly", lambda x, thin=False: True)
    for x in (small, larger):
        assert later(x, x.dtype).values is x
    wide = torch.randn(8, representation.SMALL // 32 + 1)
    assert later(wide, wide.dtype) is None
    half = wide.bfloat16()
    assert later(half, half.dtype).values.shape == (8, 8)  # of constants, only the products are kept
    assert later(half.requires_grad_(), half.dtype) is None
    assert later(torch.randn(1100, 2), torch.float32) is None  # whose Gram matrix is large


@pytest.mark.parametrize("most", [1, 12 * 30 * 8, 12 * 12 * 8 * 4])  # layers one by one, and matrices of all pairs
def test_no_more_than_so_many_bytes_are_copied_at_once(slow_starts, monkeypatch, most):
    for module in (representation, pair_loss):
        monkeypatch.setattr(module, "MOST", most)
    check_against_the_definition(torch.float64, 1e-12, 3e-11)


def test_features_that_are_overwritten_are_copied_with_the_gradient_that_they_had(slow_starts):
    x = torch.randn(8, 20, dtype=torch.float64, requires_grad=True)
    other = gram(torch.randn(8, 20, dtype=torch.float64))
    grads = []
    for overwrite in (False, True):
        hidden = x * 2
        kept = later(hidden, hidden.dtype, keep_copy=True)
        if overwrite:
            hidden.relu_()
        loss, _ = guidance_loss([("t", "g")], CKA, complete({"t": kept}), {"g": other})
        grads.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*grads)


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
    config = GuidanceConfig(target_layers=["first", "side", "masked", "last"], guide_layers=["Linear"])
    guidance, rows = GuidanceLoss(target, guide, config), torch.randn(batch, 6)
    with guidance.watch({"input": rows}) as watched:
        target(rows)
    assert "masked" not in {name for name, _ in guidance.pairs}
    watched.loss.backward()
    for name, weights in target.named_parameters():
        layer = name.split(".")[0]
        assert (weights.grad is not None) == (layer in {pair[0] for pair in guidance.pairs})
        assert weights.grad is None or weights.grad.isfinite().all()


@pytest.mark.parametrize("batch", [8, 200])  # all at once, and one by one
def test_hidden_states_that_the_user_overwrites_are_compared_as_they_were(batch):
    guidance = GuidanceLoss(*(gpt2(layers=2) for _ in range(2)), GuidanceConfig(log_measures=["rsa"]))
    rows, found = token_batch(batch), []
    for overwrite in (False, True):
        with torch.no_grad(), guidance.watch(rows) as watched:
            states = guidance.target(**watched.inputs).hidden_states
            if overwrite:
                for state in states:
                    state[0] = 0
        found.append(watched.similarities)
    assert found[0] == found[1]


def test_steps_are_as_many_for_fifty_layers_as_for_two(slow_starts):
    def steps(count):
        made = {f"t{i}": torch.randn(8, 20, requires_grad=True) for i in range(count)}
        others = {"g": gram(torch.randn(8, 20))}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            kept = {name: later(x, x.dtype) for name, x in made.items()}
            loss, _ = guidance_loss([(name, "g") for name in made], CKA, complete(kept), others)
            loss.backward()
        views = ("aten::unbind", "aten::select", "aten::detach", "detach", "aten::as_strided", "AccumulateGrad")
        heavy = ("aten::mul", "aten::sub_", "aten::bmm", "aten::mean", "aten::addcmul_", "aten::add", "aten::cat")
        assert not set(views) & set(heavy)
        return sum(event.name in heavy for event in profile.events())

    assert steps(50) == steps(2) > 5


@pytest.mark.parametrize("axis", ["sequence", "token"])
def test_a_guidance_loss_goes_either_way_to_the_same(axis, monkeypatch):
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.ReLU(inplace=True))
    guide = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9))
    config = GuidanceConfig(target_layers=["Linear"], guide_layers=["Linear"], sample_axis=axis)
    loss = GuidanceLoss(target, guide, config)
    found = []
    for slow in (False, True):
        for module in (representation, pair_loss):
            monkeypatch.setattr(module, "starts_slowly", lambda x, thin=False, slow=slow: slow)
        with loss.watch({"input": torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(1))}) as watched:
            target(watched.inputs["input"])
        watched.loss.backward()
        found.append([watched.loss.detach(), *(p.grad for p in target.parameters() if p.grad is not None)])
        target.zero_grad()
        assert list(watched.similarities["linear_cka"]) == ["0~0", "2~2"]
    torch.testing.assert_close(*found)


def test_what_is_kept_for_later_says_what_it_can_be_made_with():
    x = torch.zeros(4, 6)
    alike = [Later(x, torch.float32), Later(torch.ones(4, 6), torch.float32)]
    assert alike[0].kind == alike[1].kind
    others = [Later(x, torch.bfloat16), Later(x.double(), torch.float32), Later(x[:, :4], torch.float32)]
    others += [Later(x, torch.float32, multiplied=True), Later(x.to("meta"), torch.float32)]  # and on another device
    others += [Later(x, torch.float32, thin=True)]
    assert len({layer.kind for layer in [*alike, *others]}) == 7
