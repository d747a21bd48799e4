"""The sketch is linear, unbiased, as exact as it says, and the same for all who use it."""

from __future__ import annotations

import pytest
import torch
from builders import EVEN, gpt2, hidden_states, linear, llama, token_batch
from torch import Tensor, nn

from hf_guidance import GuidanceLoss
from hf_guidance.similarity.cosines import agreement_of_halves
from hf_guidance.similarity.layers import gram, layer_of
from hf_guidance.similarity.pair_loss import guidance_loss, similarities
from hf_guidance.similarity.registry import MEASURES, get_measure
from hf_guidance.similarity.sketch import Sketch


def spectrum(rows: int, width: int, decay: float, seed: int = 0) -> Tensor:
    """Centred features in float64 whose energy falls as i^(−decay) over the directions, in coordinates at random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, width + 1, dtype=torch.float64) ** (-decay / 2)
    x = x[:, torch.randperm(width, generator=generator)]
    return x - x.mean(0)


def participation_ratio(x: Tensor) -> float:
    values = torch.linalg.svdvals(x).square()
    return (values.sum().square() / values.square().sum()).item()


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_the_grams_error_is_what_size_and_participation_ratio_say(size: int, decay: float) -> None:
    x = spectrum(32, 2000, decay)
    exact = x @ x.T
    bound = ((participation_ratio(x) + 1) / size) ** 0.5
    errors, mean = [], torch.zeros_like(exact)
    for draw in range(60):
        y = Sketch(size)(f"layer {draw}", x)
        assert y.shape == (32, size)
        errors.append(((y @ y.T - exact).norm() / exact.norm()).square())
        mean += y @ y.T / 60
    measured = torch.stack(errors).mean().sqrt().item()
    assert 0.3 * bound < measured < 1.15 * bound, "no worse than the bound, and the bound says something"
    assert ((mean - exact).norm() / exact.norm()).item() < 2 * bound / 60**0.5, "unbiased: it averages out"


def test_energy_in_one_coordinate_of_every_block_does_not_pile_up() -> None:
    size, blocks = 64, 40
    x = torch.zeros(16, size * blocks, dtype=torch.float64)
    x[:, ::size] = spectrum(16, blocks, 0.0)  # as one channel of massive activations in all tokens
    error = [((y := Sketch(size)(f"{i}", x)) @ y.T - x @ x.T).norm() / (x @ x.T).norm() for i in range(40)]
    bound = ((participation_ratio(x) + 1) / size) ** 0.5
    assert torch.stack(error).square().mean().sqrt() < 1.2 * bound


@pytest.mark.parametrize("width", [150, 128, 320])  # the last block shorter than the others, and as long
def test_it_is_linear_and_its_gradient_is_its_transpose(width: int) -> None:
    x, y = (torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    sketch = Sketch(64)
    torch.testing.assert_close(sketch("a", 2 * x - y), 2 * sketch("a", x) - sketch("a", y))
    assert torch.autograd.gradcheck(lambda features: sketch("a", features), (x[:2].requires_grad_(),))


def test_a_sample_has_the_same_sketch_in_a_batch_of_any_size() -> None:
    x, sketch = torch.randn(600, 320), Sketch(64)
    few = torch.cat([sketch("a", rows) for rows in x.split(50)])  # which are moved one by one
    torch.testing.assert_close(sketch("a", x), few)


def test_layers_that_are_not_wider_stay_and_all_others_have_signs_of_their_own() -> None:
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    assert Sketch(200)("a", x) is x
    assert not Sketch(200).sketches(200)
    assert Sketch(199)("a", x).shape == (5, 198)  # two halves
    one, again = Sketch(64)("a", x), Sketch(64)("a", x)
    assert torch.equal(one, again)
    for other in (Sketch(64)("b", x), Sketch(64, "guide")("a", x), one.roll(32, 1)):
        assert not torch.allclose(one, other)


def test_a_masked_gram_sketches_what_is_left_of_the_mask() -> None:
    x = torch.randn(40, 6, 50, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 5] * 10)[:, None]
    exact = gram(x, mask)
    errors = [layer_of(x, mask, sketch=lambda c, i=i: Sketch(200)(f"{i}", c)).gram() - exact for i in range(30)]
    relative = torch.stack([error.norm() / exact.norm() for error in errors]).square().mean().sqrt()
    values = torch.linalg.eigvalsh(exact.double())
    bound = ((values.sum().square() / values.square().sum() + 1) / 200) ** 0.5
    assert 0.3 * bound < relative < 1.3 * bound
    junk = torch.where(mask[..., None], x, 1e3)
    assert torch.equal(
        layer_of(junk, mask, sketch=lambda c: Sketch(200)("a", c)).values,
        layer_of(x, mask, sketch=lambda c: Sketch(200)("a", c)).values,
    )


def test_the_loss_is_that_of_sketched_layers_and_does_not_depend_on_seed_or_step() -> None:
    batch = token_batch(rows=16)

    def loss(step: int = 0, seed: int = 0, **config: object) -> Tensor:
        target = gpt2()
        guidance = GuidanceLoss(target, llama(), linear(**config), seed=seed)
        with guidance.watch(batch, step=step) as watched:
            target(**watched.inputs)
        return watched.loss.detach()

    ours, theirs = hidden_states(gpt2(), batch), hidden_states(llama(), {"input_ids": batch["input_ids"]})

    def halves(role: str, layers: list[Tensor]) -> list[Tensor]:
        sketched = [Sketch(32, role)(f"hidden_states.{i + 1}", x.flatten(1)) for i, x in enumerate(layers)]
        centred = [x.double() - x.double().mean(0) for x in sketched]
        return [torch.stack([half @ half.T for half in x.split(16, 1)]) for x in centred]

    def similarity(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return (k.mean(0) * l.mean(0)).sum() / ((k[0] * k[1]).sum() * (l[0] * l[1]).sum()).sqrt()

    ours, theirs = halves("target", ours), halves("guide", theirs)
    sketched = loss(sketch=32)
    assert sketched.item() == pytest.approx(sum(1 - similarity(ours[t], theirs[g]) for t, g in EVEN).item(), abs=1e-5)
    assert torch.equal(sketched, loss(step=5, seed=9, sketch=32))


def test_a_sketch_of_more_numbers_than_any_layer_has_is_an_error() -> None:
    target = gpt2()
    guidance = GuidanceLoss(target, llama(), linear(sketch=1000))
    words = r"sketch is 1000, but the widest layer that is compared has 72 features: there is nothing to sketch"
    with pytest.raises(ValueError, match=words), guidance.watch(token_batch()) as watched:
        target(**watched.inputs)
    with pytest.raises(ValueError, match="sketch is 1; it must be at least 2"):
        linear(sketch=1)
    for settings in ({"measure": "ridge"}, {"log_measures": ["rsa"]}):
        with pytest.raises(ValueError, match=r"takes no sketch, .* use one of linear_cka, debiased_cka in measure"):
            GuidanceLoss(gpt2(), llama(), linear(sketch=16, **settings))


@pytest.mark.parametrize("form", [0, 10_000])  # by Gram matrices, and by features
@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.takes_sketch])
def test_a_sketched_similarity_is_the_exact_one_up_to_its_standard_error(name: str, form: float) -> None:
    x = spectrum(32, 2000, 1.0)
    y = x[:, :1500] + 0.5 * spectrum(32, 1500, 1.0, seed=1)
    measure = get_measure(name)
    found = []
    for draw in range(30):
        sides = [
            {"": layer_of(Sketch(256, role)(f"{draw}", z), parts=2, primal_below=form)}
            for role, z in (("target", x), ("guide", y))
        ]
        found += [value.item() for value in similarities([("", "")], measure, *sides).values()]
    values = torch.tensor(found)
    error = values.std().item() / 30**0.5
    assert abs(values.mean().item() - measure(x, y).item()) < 3.5 * error + 0.01
    assert error < 0.05


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.takes_sketch])
def test_the_gradient_of_a_sketched_similarity_is_that_of_finite_differences(name: str) -> None:
    x, y = (torch.randn(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    guide = {"": layer_of(Sketch(16, "guide")("a", y), parts=2)}
    for form in (0, 10_000):

        def loss(x: Tensor, form: float = form) -> Tensor:
            target = {"": layer_of(Sketch(16)("a", x), parts=2, primal_below=form)}
            return guidance_loss([("", "")], get_measure(name), target, guide)[0]

        assert torch.autograd.gradcheck(loss, x.requires_grad_())


@pytest.mark.parametrize("size", [8, 10_000])  # of which the second leaves all layers as they are
def test_a_module_that_is_overwritten_counts_as_it_was(size: int) -> None:
    def network(inplace: bool, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        convolutions = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]
        return nn.Sequential(*(part for c in convolutions for part in (c, nn.ReLU(inplace))))

    found = []
    for inplace in (False, True):
        target, guide = network(inplace, 0), network(inplace, 1)
        loss = GuidanceLoss(target, guide, linear(target_layers=["Conv2d"], guide_layers=["Conv2d"], sketch=8))
        assert loss.sketch is not None
        loss.sketch.size = loss.running.sketch.size = size
        with loss.watch({"input": torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(2))}) as watched:
            if size > 1000:  # a run of nothing but narrow layers is refused
                loss.sketch.widest = size + 1
            target(watched.inputs["input"])
        assert watched.loss is not None
        watched.loss.backward()
        found.append([watched.loss.detach(), *(p.grad for p in target.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("rank", "is_said"), [(2000, True), (4, False)])
def test_a_sketch_that_is_mostly_noise_is_said(rank: int, is_said: bool, caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, rank, generator=generator) @ torch.randn(rank, 2000, generator=generator)
    networks = [nn.Sequential(nn.Identity(), nn.Linear(2000, 2000)) for _ in range(2)]
    for network in networks:
        nn.init.eye_(network[1].weight)
    guidance = GuidanceLoss(*networks, linear(sketch=64, target_layers=["1"], guide_layers=["1"]))
    with guidance.watch({"input": rows}):
        networks[0](rows)
    assert ("debiased_cka is mostly noise. Raise sketch, or leave it out" in caplog.text) == is_said


def test_halves_agree_where_directions_are_few() -> None:
    few = spectrum(32, 2000, 3.0)
    for form in (0, 10_000):
        layer = layer_of(Sketch(256)("a", few), parts=2, primal_below=form)
        assert 0.9 < agreement_of_halves(layer, True) <= 1.001
        noise = layer_of(Sketch(64)("a", spectrum(32, 2000, 0.0)), parts=2, primal_below=form)
        assert abs(agreement_of_halves(noise, True)) < 0.25 < agreement_of_halves(noise, False)
