"""A layer on a batch: its two forms, centring, scale, masks, dead layers, and the gradient of its features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_guidance.similarity.layers import dual, from_product, gram, halves_of, layer_of, masked, primal
from hf_guidance.similarity.matrices import u_center
from hf_guidance.similarity.pair_loss import guidance_loss
from hf_guidance.similarity.registry import MEASURES, get_measure

Array = np.ndarray
FORMS = {"primal": math.inf, "dual": 0}  # `primal_below` that gives each form


def features(shape: tuple[int, int], seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


# -------------------------------------------------------------------------------------------------------- two forms


def compared(name: str, x: Tensor, y: Tensor, mask: Tensor | None = None, **forms: float) -> tuple[Tensor, Tensor]:
    """Similarity of two layers and its gradient in the first, in given forms."""
    x = x.clone().requires_grad_()
    target = layer_of(x, mask, primal_below=forms["target"])
    guide = layer_of(y, mask, primal_below=forms["guide"])
    loss, _ = guidance_loss([("t", "g")], get_measure(name), {"t": target}, {"g": guide})
    loss.backward()
    return 1 - loss.detach(), x.grad


@pytest.mark.parametrize("widths", [(7, 5), (5, 40), (40, 5), (30, 40)])
@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_is_the_same_in_any_mix_of_forms(name: str, widths: tuple[int, int]) -> None:
    x, y = features((24, widths[0]), 0, 2.0), features((24, widths[1]), 1, -3.0)
    y[:, :5] += x[:, :5]
    value, gradient = compared(name, x, y, target=0, guide=0)
    for target in FORMS.values():
        for guide in FORMS.values():
            other, other_gradient = compared(name, x, y, target=target, guide=guide)
            assert other.item() == pytest.approx(value.item(), abs=1e-12)
            torch.testing.assert_close(other_gradient, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(MEASURES) - {"procrustes"}))
def test_a_mask_means_the_same_in_both_forms(name: str) -> None:
    x, y = (_masked(seed) for seed in (0, 1))
    mask = lengths_mask(20, 6, shortest=1)
    mask[:, 5] = torch.arange(20) == 4  # a position that one sample has alone
    value, gradient = compared(name, x, y, mask, target=0, guide=0)
    for forms in ({"target": math.inf, "guide": math.inf}, {"target": 0, "guide": math.inf}):
        other, other_gradient = compared(name, x, y, mask, **forms)
        assert other.item() == pytest.approx(value.item(), abs=1e-12)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-9, atol=1e-12)
    assert gradient[~mask].count_nonzero() == 0


def _masked(seed: int) -> Tensor:
    return torch.randn(20, 6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


@pytest.mark.parametrize(
    ("n", "d"), [(8, 16), (32, 16), (512, 16), (8, 2000), (32, 2000), (512, 2000), (8, 50_000), (8, 500_000)]
)
@pytest.mark.parametrize("name", ["linear_cka", "debiased_cka", "ridge", "ridge_loo"])
def test_float32_is_float64_up_to_rounding_in_the_form_that_is_chosen(name: str, n: int, d: int) -> None:
    x = features((n, d), 0, 0.5)
    y = x @ features((d, 12), 1) / d**0.5 + features((n, 12), 2)
    x, y = x.float(), y.float()
    value, gradient = compared(name, x, y, target=0.4, guide=0.4)
    exact, exact_gradient = compared(name, x.double(), y.double(), target=0.4, guide=0.4)
    close = 2e-4 if d > 2000 else 1e-5  # a sum of many products, from which U-centring takes most
    assert value.item() == pytest.approx(exact.item(), abs=close)
    assert (gradient.double() - exact_gradient).norm() < 100 * close * exact_gradient.norm()


def test_the_form_is_the_one_of_fewer_operations() -> None:
    assert [layer_of(torch.randn(10, d)).form for d in (4, 5)] == ["primal", "dual"]
    assert layer_of(torch.randn(10, 4), primal_below=0).form == "dual"
    layer = layer_of(torch.randn(10, 2, 2))
    assert (layer.samples, layer.width, layer.parts, layer.values.shape) == (10, 4, 1, (10, 4))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_centred_and_has_a_mean_squared_norm_of_1(form: str) -> None:
    layer = layer_of(features((24, 7), 0, 9.0) * 100, primal_below=FORMS[form])
    assert layer.form == form
    assert layer.gram().diagonal().mean().item() == pytest.approx(1)
    assert layer.values.mean(0).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_features_that_are_overwritten_count_as_they_were(form: str) -> None:
    x, slope = torch.randn(8, 20, dtype=torch.float64, requires_grad=True), features((8, 20))
    grads = []
    for overwrite in (False, True):
        hidden = x * 2
        layer = layer_of(hidden, primal_below=FORMS[form], copy=True)
        if overwrite:
            hidden.relu_()
        tangent = layer.tangent(slope[:, : layer.values.shape[1]])
        grads.append(torch.autograd.grad(layer.values, x, tangent.detach())[0])
    torch.testing.assert_close(*grads)


def test_features_that_are_overwritten_before_the_backward_without_a_copy_are_an_error() -> None:
    x = torch.randn(8, 20, requires_grad=True)
    hidden = x * 2
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):  # as under checkpointing
        layer = layer_of(hidden, primal_below=0)
    with torch.no_grad():
        hidden.mul_(3)
    with pytest.raises(RuntimeError, match=r"overwritten in place before the backward, .* clone the outputs"):
        torch.autograd.grad(layer.values, x, torch.ones(8, 8))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_tangent_of_any_slope_reaches_the_features_as_that_slope_would(form: str, parts: int) -> None:
    x = features((9, 6), 0, 1.5).requires_grad_()
    layer = layer_of(x, primal_below=FORMS[form], parts=parts)
    slope = torch.randn(layer.values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tangent = layer.constant(slope).tangent(slope)
    (found,) = torch.autograd.grad(layer.values, x, tangent)
    centred = x - x.mean(0)
    centred = centred * (9 / centred.square().sum()).sqrt()
    halves = centred.unflatten(1, (parts, -1)).transpose(0, 1) * parts**0.5
    values = centred if form == "primal" else halves @ halves.mT
    torch.testing.assert_close(layer.values.reshape(values.shape), values)
    (expected,) = torch.autograd.grad(values, x, slope.reshape(values.shape))
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------- Gram matrices


def centred(x: Array) -> Array:
    return x - x.mean(0)


def unit(kernel: Tensor) -> Tensor:
    return kernel / kernel.norm()


def lengths_mask(n: int, length: int, shortest: int, seed: int = 0) -> Tensor:
    lengths = torch.randint(shortest, length + 1, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) < lengths[:, None]


def gram_by_hand(x: Array, mask: Array) -> Array:
    """Entry by entry, with the mean of every column taken over its valid entries, and what that costs given back."""
    n, kernel = len(x), np.zeros((len(x), len(x)))
    for t in range(x.shape[1]):
        valid = np.flatnonzero(mask[:, t])
        if len(valid) < 2:
            continue
        rest = x[valid, t] - x[valid, t].mean(0)
        kernel[np.ix_(valid, valid)] += rest @ rest.T + np.square(rest).sum() / (len(valid) * (len(valid) - 1))
    h = np.eye(n) - 1 / n
    kernel = h @ kernel @ h
    return kernel / np.trace(kernel) * n


def masked_features(seed: int, n: int = 32, length: int = 20, d: int = 64) -> Tensor:
    return 1 + torch.randn(n, length, d, generator=torch.Generator().manual_seed(seed))


def debiased(k: Tensor, l: Tensor) -> float:  # noqa: E741
    return (unit(u_center(k)) * unit(u_center(l))).sum().item()


@pytest.mark.parametrize("width", [50, 3000, 9000])  # fewer than the samples; in one block; in three
@pytest.mark.parametrize("ratio", [0.0, 3.0, 11.0, 100.0, 1e5])  # energy of the mean to that of the signal
def test_gram_and_its_gradient_whatever_the_width_and_the_mean(width: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(width, generator=generator)
    x = torch.randn(96, width, generator=generator) + mean * (ratio * width) ** 0.5 / mean.norm()
    slope = torch.randn(96, 96, generator=generator)
    exact = x.double().requires_grad_()
    expected = gram(exact)
    (expected * slope.double()).sum().backward()
    ours = x.clone().requires_grad_()
    found = gram(ours)
    (found * slope).sum().backward()
    rounding = 1.5e-6 * (1 + min(ratio, 12))  # beyond, the features are centred first
    for kernel in (gram(x), found):
        assert (kernel - expected).abs().max() < rounding
    assert (ours.grad - exact.grad).norm() < 1e-6 * exact.grad.norm()


def test_gram_is_the_centred_kernel_with_a_mean_diagonal_of_1() -> None:
    x = features((24, 7))
    kernel = centred(x.numpy()) @ centred(x.numpy()).T
    np.testing.assert_allclose(gram(x), kernel / np.trace(kernel) * len(kernel), atol=1e-12)


@pytest.mark.parametrize(("given", "kept"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_gram_is_in_float32_or_better(given: str, kept: str) -> None:
    assert gram(features((24, 7)).to(getattr(torch, given))).dtype == getattr(torch, kept)


def test_gram_with_a_mask_is_the_one_by_hand() -> None:
    x, mask = masked_features(0, n=9, length=6, d=3).double(), lengths_mask(9, 6, shortest=1)
    mask[:, 2] = False  # a position that nobody has, and one that only one sample has
    mask[:, 5] = torch.arange(9) == 4
    np.testing.assert_allclose(gram(x, mask), gram_by_hand(x.numpy(), mask.numpy()), atol=1e-12)


def test_gram_with_a_mask_takes_features_of_one_number_a_position() -> None:
    x, mask = masked_features(0, n=9, length=6, d=1).double(), lengths_mask(9, 6, shortest=1)
    np.testing.assert_allclose(gram(x[..., 0], mask), gram_by_hand(x.numpy(), mask.numpy()), atol=1e-12)


def test_gram_with_nothing_masked_is_that_without_a_mask() -> None:
    x = masked_features(0).double()
    torch.testing.assert_close(gram(x, torch.ones(x.shape[:2], dtype=torch.bool)), gram(x))


@pytest.mark.parametrize("junk", [0.0, 1e6, math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 7, 20], ids=["left", "middle", "right"])
def test_amount_side_and_content_of_padding_do_not_matter(where: int, junk: float) -> None:
    x, mask = masked_features(0), lengths_mask(32, 20, shortest=3)
    padding, invalid = torch.full((32, 5, 64), junk), torch.zeros(32, 5, dtype=torch.bool)
    longer = torch.cat([x[:, :where], padding, x[:, where:]], 1).requires_grad_()
    longer_mask = torch.cat([mask[:, :where], invalid, mask[:, where:]], 1)
    kernel = gram(longer, longer_mask.long())
    (kernel**2).sum().backward()
    torch.testing.assert_close(kernel, gram(torch.where(mask[..., None], x, junk), mask), rtol=0, atol=2e-6)
    assert longer.grad[~longer_mask].count_nonzero() == 0
    assert longer.grad.isfinite().all()


def test_gradient_of_a_masked_gram_is_that_of_finite_differences() -> None:
    x, mask = masked_features(0, n=5, length=4, d=2).double(), lengths_mask(5, 4, shortest=1)
    fixed = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (unit(gram(x, mask)) * fixed).sum(), x.requires_grad_())


def zero_filled(x: Tensor, mask: Tensor) -> Tensor:
    return gram(x * mask[..., None])


def centred_then_zero_filled(x: Tensor, mask: Tensor) -> Tensor:
    valid = mask[..., None]
    rest = torch.where(valid, x - (x * valid).sum(0) / valid.sum(0).clamp(min=1), 0)
    return rest.flatten(1) @ rest.flatten(1).T


@pytest.mark.parametrize(
    ("kernel", "low", "high"), [(gram, -0.05, 0.05), (centred_then_zero_filled, 0.2, 1), (zero_filled, 0.9, 1)]
)
def test_independent_features_under_one_mask_are_unlike_unless_padding_is_filled_in(
    kernel: Any, low: float, high: float
) -> None:
    values = []
    for seed in range(10):
        mask = lengths_mask(32, 20, shortest=2, seed=seed)
        x, y = masked_features(2 * seed), masked_features(2 * seed + 1)
        values.append(debiased(kernel(x, mask), kernel(y, mask)))
    assert low < np.mean(values) < high


@pytest.mark.parametrize(
    ("shape", "mask", "words"),
    [
        ((5,), None, r"features have shape \(5,\); expected \(n, d\)"),
        ((5, 7), (5, 6), r"shape \(5, 7\); expected \(5, 6, …\) to match the mask"),
    ],
)
def test_gram_says_which_shape_it_expects(shape: tuple[int, ...], mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gram(torch.zeros(shape), None if mask is None else torch.ones(mask))


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
