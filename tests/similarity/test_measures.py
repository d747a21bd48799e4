"""One conformance suite over every measure, against definitions written out in numpy, scipy and scikit-learn."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import Tensor

import hf_guidance
from hf_guidance.similarity import measures
from hf_guidance.similarity.layers import layer_of
from hf_guidance.similarity.matrices import exact_float32
from hf_guidance.similarity.pair_loss import similarities
from hf_guidance.similarity.registry import MEASURES, get_measure

Array = np.ndarray
Similarity = Callable[[Tensor, Tensor], Tensor]
SHAPES = [(24, 7, 11), (12, 40, 30)]  # (n, d_target, d_guide): more samples than features, and fewer

# ------------------------------------------------------------------------------------------------------ references


def hsic(k: Array, l: Array) -> float:  # noqa: E741
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ l @ h)


def song_hsic(k: Array, l: Array) -> float:  # noqa: E741
    """The unbiased estimator in its three terms (Song et al. 2012, eq. 5)."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    cross = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return (np.trace(k @ l) + cross) / (n * (n - 3))


def alignment(k: Array, l: Array, hsic: Callable[[Array, Array], float] = hsic) -> float:  # noqa: E741
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


def centred(x: Array) -> Array:
    return x - x.mean(0)


def rbf_kernel(x: Array) -> Array:
    distance = pdist(x)
    return np.eye(len(x)) + squareform(np.exp(-(distance**2) / (2 * np.mean(distance**2))))


def cosines(x: Array) -> Array:
    return 1 - pdist(centred(x), "cosine")


def ridge_r2(x: Array, y: Array) -> float:
    penalty = 0.1 * np.square(centred(x)).sum() / len(x)
    return r2_score(y, Ridge(alpha=penalty).fit(x, y).predict(x), multioutput="variance_weighted")


def ridge_loo_r2(x: Array, y: Array) -> float:
    """Leave each sample out, fit on the others, and predict it; λ and the mean that R² is against are theirs too."""
    penalty = np.square(centred(x)).sum() / len(x)
    errors, spread = 0.0, 0.0
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        fit = Ridge(alpha=penalty).fit(x[others], y[others])
        errors += np.square(y[i] - fit.predict(x[i : i + 1])[0]).sum()
        spread += np.square(y[i] - y[others].mean(0)).sum()
    return 1 - errors / spread


def nuclear_cosine(x: Array, y: Array) -> float:
    x, y = centred(x), centred(y)
    return np.linalg.norm(x.T @ y, "nuc") / (np.linalg.norm(x) * np.linalg.norm(y))


REFERENCES: dict[str, Callable[[Array, Array], float]] = {
    "linear_cka": lambda x, y: alignment(x @ x.T, y @ y.T),
    # centred first: in Song's three terms a float64 loses all its digits to the offset
    "debiased_cka": lambda x, y: alignment(centred(x) @ centred(x).T, centred(y) @ centred(y).T, song_hsic),
    "rbf_cka": lambda x, y: alignment(rbf_kernel(x), rbf_kernel(y)),
    "rsa": lambda x, y: pearsonr(cosines(x), cosines(y)).statistic,
    "ridge": ridge_r2,
    "ridge_loo": ridge_loo_r2,
    "procrustes": nuclear_cosine,
}

# Greatest deviation from the reference on the same rounded inputs, whatever dtype they were rounded to, in float32
# arithmetic; and with a spectrum that decays like that of a trained layer, of which float32 sees the upper half only.
TOLERANCES = {
    "linear_cka": (1e-5, 1e-5),
    "debiased_cka": (1e-5, 1e-5),
    "rbf_cka": (1e-5, 1e-5),
    "rsa": (1e-5, 1e-5),
    "ridge": (1e-5, 5e-5),
    "ridge_loo": (1e-5, 5e-5),
    "procrustes": (1e-5, 1e-3),
}
FLOAT64_TOLERANCE = 1e-10
BFLOAT16_TOLERANCE = 2e-2  # what rounding the inputs to bfloat16 may change


def features(shape: tuple[int, int, int] = SHAPES[0], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Target and guide features in float64 that have something in common."""
    n, d_target, d_guide = shape
    normal = torch.Generator().manual_seed(seed)
    x, weight, noise = (
        torch.randn(size, generator=normal, dtype=torch.float64)
        for size in ((n, d_target), (d_target, d_guide), (n, d_guide))
    )
    return x, x @ weight / d_target**0.5 + noise


def reference(name: str, x: Tensor, y: Tensor) -> float:
    return REFERENCES[name](x.detach().double().numpy(), y.detach().double().numpy())


@pytest.fixture(params=MEASURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def measure(name: str) -> Similarity:
    return getattr(measures, name)


# ------------------------------------------------------------------------------------------------------- the family


def test_public_functions_measures_references_and_tolerances_are_the_same_set() -> None:
    public = {
        name
        for name, function in vars(measures).items()
        if inspect.isfunction(function) and list(inspect.signature(function).parameters)[:1] == ["features_target"]
    }
    assert public == set(MEASURES) == set(REFERENCES) == set(TOLERANCES)
    assert public <= set(hf_guidance.__all__)


def test_public_function_and_registry_entry_are_one_measure(name: str, measure: Similarity) -> None:
    x, y = features()
    assert MEASURES[name].name == name
    assert measure(x, y) == get_measure(name)(x, y)
    others = [MEASURES[other](x, y).item() for other in MEASURES if other != name]
    assert measure(x, y).item() not in others


def test_unknown_measure_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown measure 'linear_ckq'; possible are linear_cka, .*mean 'linear_cka'"):
        get_measure("linear_ckq")


# ------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float64, 0),
        (torch.float64, 10),
        (torch.float32, 0),
        (torch.float32, 1000),  # mean/std
        (torch.bfloat16, 0),
        (torch.bfloat16, 20),
        (torch.float16, 0),
        (torch.float16, 20),
    ],
)
def test_value_is_the_references(
    name: str, measure: Similarity, dtype: torch.dtype, offset: float, shape: tuple[int, int, int]
) -> None:
    x, y = (side.add(offset).to(dtype) for side in features(shape))
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else TOLERANCES[name][0]
    value = measure(x, y)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(reference(name, x, y), abs=tolerance)


@pytest.mark.parametrize("shape", [(96, 200, 64), (96, 32, 300)])
def test_value_is_the_references_for_a_decaying_spectrum(
    name: str, measure: Similarity, shape: tuple[int, int, int]
) -> None:
    x, y = ((side * torch.arange(1, side.shape[1] + 1) ** -1.5).float() for side in features(shape))
    assert measure(x, y).item() == pytest.approx(reference(name, x, y), abs=TOLERANCES[name][1])


def test_rounding_features_to_bfloat16_hardly_moves_the_value(name: str, measure: Similarity) -> None:
    x, y = features((64, 32, 48))
    rounded = measure(x.bfloat16(), y.bfloat16()).item()
    assert rounded == pytest.approx(reference(name, x, y), abs=BFLOAT16_TOLERANCE)


def test_axes_after_the_first_are_features(name: str, measure: Similarity) -> None:
    x, y = features((12, 40, 30))
    assert measure(x.reshape(12, 5, 8), y.reshape(12, 3, 2, 5)) == measure(x, y)


def test_dtypes_may_differ(name: str, measure: Similarity) -> None:
    x, y = features()
    x.requires_grad_()
    value = measure(x, y.float())
    value.backward()
    assert value.dtype == x.grad.dtype == torch.float64
    assert value.item() == pytest.approx(reference(name, x, y.float()), abs=TOLERANCES[name][0])


def test_identical_features_have_similarity_1_or_what_the_penalty_leaves(name: str, measure: Similarity) -> None:
    x, _ = (side.float() for side in features())
    if name == "ridge":  # R² = 1 − Σ s_i² (λ / (s_i² + λ))² / Σ s_i²
        power = np.square(np.linalg.svd(centred(x.numpy()), compute_uv=False))
        penalty = 0.1 * power.sum() / len(x)
        expected = 1 - (power * (penalty / (power + penalty)) ** 2).sum() / power.sum()
    elif name == "ridge_loo":
        expected = ridge_loo_r2(x.double().numpy(), x.double().numpy())
    else:
        expected = 1
    assert measure(x, x).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("n", "biased"), [(32, 0.94), (128, 0.80), (256, 0.67)])
def test_independent_gaussians_have_the_known_bias(n: int, biased: float) -> None:
    normal = torch.Generator().manual_seed(n)
    x, y = torch.randn(2, n, 512, generator=normal)
    assert measures.linear_cka(x, y).item() == pytest.approx(biased, abs=0.02)
    assert measures.debiased_cka(x, y).item() == pytest.approx(0, abs=0.05)


# --------------------------------------------------------------------------------------------------- the invariances


def rotation(d: int) -> Tensor:
    normal = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(d, d, generator=normal, dtype=torch.float64)).Q


TRANSFORMATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonal": lambda x: x @ rotation(x.shape[1]),
    "isotropic_scaling": lambda x: 3.7 * x,
    "translation": lambda x: x + torch.linspace(-5, 5, x.shape[1]),
    "permutation": lambda x: x.flip(1),
    "invertible_linear": lambda x: x * torch.linspace(0.2, 5, x.shape[1]),
}


def test_every_declared_invariance_has_a_transformation() -> None:
    declared = set.union(*(set(measure.invariant_to) for measure in MEASURES.values()))
    assert declared <= set(TRANSFORMATIONS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["target", "guide"])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_value_is_invariant_to_what_is_declared_and_to_nothing_else(
    name: str, measure: Similarity, transformation: str, side: str, shape: tuple[int, int, int]
) -> None:
    x, y = features(shape)
    before, transform = measure(x, y).item(), TRANSFORMATIONS[transformation]
    after = (measure(transform(x), y) if side == "target" else measure(x, transform(y))).item()
    if transformation in MEASURES[name].invariant_to:
        assert after == pytest.approx(before, abs=1e-9)
    else:
        assert abs(after - before) > 1e-3


def test_order_of_the_samples_does_not_matter_but_their_pairing_does(name: str, measure: Similarity) -> None:
    x, y = features()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert measure(x[order], y[order]).item() == pytest.approx(measure(x, y).item(), abs=1e-9)
    assert abs(measure(x[order], y) - measure(x, y)) > 1e-2


def test_sides_can_be_swapped_except_in_ridge(name: str, measure: Similarity) -> None:
    x, y = features()
    is_symmetric = measure(x, y).item() == pytest.approx(measure(y, x).item(), abs=1e-9)
    assert is_symmetric == (name not in ("ridge", "ridge_loo"))


def test_tensor_cores_are_kept_out_and_put_back_even_after_an_error() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with contextlib.suppress(RuntimeError), exact_float32(torch.device("cuda")):
            inside = matmul.fp32_precision
            raise RuntimeError
        after = matmul.fp32_precision
    finally:
        matmul.fp32_precision = before
    assert (inside, after) == ("ieee", "tf32")


@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1e4, 1e10])
def test_features_of_any_scale_neither_overflow_nor_vanish(name: str, measure: Similarity, scale: float) -> None:
    x, y = (side.float() for side in features())
    x_scaled = (x * scale).requires_grad_()
    value = measure(x_scaled, y * scale)
    value.backward()
    x.requires_grad_()
    measure(x, y).backward()
    assert value.item() == pytest.approx(reference(name, x, y), abs=TOLERANCES[name][0])
    torch.testing.assert_close(x_scaled.grad * scale, x.grad, rtol=1e-3, atol=1e-6)


def test_autocast_changes_neither_value_nor_gradient(name: str, measure: Similarity) -> None:
    x, y = (side.float() for side in features((32, 20, 24)))
    plain, cast = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = measure(plain, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        value_cast = measure(cast, y)
    assert value_cast == value
    value.backward()
    value_cast.backward()
    assert torch.equal(cast.grad, plain.grad)


# ----------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 30, 5), (30, 5, 5)])
def test_a_second_derivative_is_refused(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, y = (side.to(dtype) for side in features(shape))
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="similarities and guidance losses have no second derivative"):
        torch.autograd.grad(measures.linear_cka(x, y), x, create_graph=True)


@pytest.mark.parametrize("shape", [(9, 4, 5), (6, 9, 8)])
def test_gradient_is_that_of_finite_differences(measure: Similarity, shape: tuple[int, int, int]) -> None:
    x, y = features(shape)
    assert torch.autograd.gradcheck(lambda x: measure(x, y), x.requires_grad_())


def test_following_the_gradient_raises_the_similarity(measure: Similarity) -> None:
    x, y = (side.float() for side in features((16, 8, 8)))
    x.requires_grad_()
    optimizer = torch.optim.SGD([x], lr=1.0, maximize=True)
    first = measure(x, y).item()
    for _ in range(30):
        optimizer.zero_grad()
        measure(x, y).backward()
        optimizer.step()
    assert measure(x, y).item() > first + 0.02


# -------------------------------------------------------------------------------------------- layers without a signal


def constant(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-3, 7, 6).to(dtype).expand(8, 6)


DEAD: dict[str, Callable[[torch.dtype], Tensor]] = {
    "zero": lambda dtype: torch.zeros(8, 6, dtype=dtype),
    "constant": constant,
    "constant up to rounding": lambda dtype: constant(dtype) * (1 + torch.finfo(dtype).eps * (torch.eye(8, 6) > 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["target", "guide"])
@pytest.mark.parametrize("kind", DEAD)
def test_dead_layer_has_similarity_0_and_gradient_0(
    measure: Similarity, kind: str, side: str, dtype: torch.dtype
) -> None:
    dead, living = DEAD[kind](dtype).to(dtype), features((8, 6, 6))[0].to(dtype)
    x, y = (dead, living) if side == "target" else (living, dead)
    x = x.clone().requires_grad_()
    value = measure(x, y)
    value.backward()
    assert value.item() == 0
    assert x.grad.count_nonzero() == 0
    assert x.grad.isfinite().all()


def test_a_layer_with_a_small_signal_is_not_dead(measure: Similarity) -> None:
    living, _ = features((8, 6, 6))
    faint = (1 + 1e-5 * living).float()
    full = measure(living, living).item()
    assert measure(faint, living.float()).item() == pytest.approx(full, abs=0.05)
    assert full > 0.4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["target", "guide"])
def test_one_bad_number_in_the_features_makes_the_value_bad(measure: Similarity, side: int, bad: float) -> None:
    pair = [x.float() for x in features()]
    pair[side][3, 2] = bad
    assert not measure(*pair).isfinite()


@pytest.mark.parametrize("name", ["debiased_cka", "rsa"])
def test_samples_at_equal_distances_have_no_structure_and_no_gradient(name: str, measure: Similarity) -> None:
    x, y = torch.eye(16).requires_grad_(), torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    value = measure(x, y)
    value.backward()
    assert value.item() == 0
    assert x.grad.count_nonzero() == 0


@pytest.mark.parametrize("n", [5, 9])
def test_rsa_leaves_a_sample_at_the_mean_out(n: int) -> None:
    x, y = torch.arange(1.0, n + 1)[:, None].mul(0.1).requires_grad_(), features((n, 5, 7))[1].float()
    value = measures.rsa(x, y)
    value.backward()
    signs = np.sign(np.arange(n) - n // 2)  # in one dimension a cosine is ±1; that of the middle sample is none, so 0
    upper = np.triu_indices(n, 1)
    expected = pearsonr(np.outer(signs, signs)[upper], cosines(y.double().numpy())).statistic
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert x.grad.abs().max() < 1e-3


def test_equal_samples_in_the_majority_leave_a_finite_gradient(measure: Similarity) -> None:
    rows = torch.tensor([0] * 13 + [1, 2, 3])  # the median distance is 0
    x, y = features((16, 6, 5))
    x = x[rows].float().requires_grad_()
    measure(x, y.float()).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 10


# ------------------------------------------------------------------------------------------------- too few samples


def test_fewer_samples_than_the_minimum_are_an_error(name: str, measure: Similarity) -> None:
    least = MEASURES[name].min_samples
    x, y = (side[: least - 1] for side in features())
    words = rf"{name}: got {least - 1} target samples and {least - 1} guide samples; .* at least {least} of them"
    with pytest.raises(ValueError, match=words):
        measure(x, y)


def test_the_minimum_is_the_fewest_samples_that_say_anything(name: str, measure: Similarity) -> None:
    least, entry = MEASURES[name].min_samples, MEASURES[name]
    values = [measure(*features((least, 5, 5), seed)).item() for seed in range(4)]
    assert np.ptp(values) > 1e-3
    values = []
    for seed in range(4):
        x, y = ({"": layer_of(side, primal_below=0)} for side in features((least - 1, 5, 5), seed))
        values += [value.item() for value in similarities([("", "")], entry, x, y).values()]
    assert np.ptp(values) < 1e-9


def test_other_numbers_of_samples_are_an_error(name: str, measure: Similarity) -> None:
    x, y = features()
    with pytest.raises(ValueError, match=rf"{name}: got 24 target samples and 20 guide samples; both must describe"):
        measure(x, y[:20])


@pytest.mark.parametrize("width", [8, 64])
def test_features_whose_squares_overflow_are_no_dead_layer(width: int) -> None:
    huge = torch.randn(16, width) * 1e20
    assert not measures.linear_cka(huge, torch.randn(16, 4)).isfinite()


def test_the_gradient_under_autocast_is_that_of_float32() -> None:
    x, y = torch.randn(16, 8, requires_grad=True), torch.randn(16, 4)
    (expected,) = torch.autograd.grad(measures.linear_cka(x, y), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(measures.linear_cka(x, y), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
