"""Measures of the user's own, by name and registered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import linear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.similarity import registry
from hf_guidance.similarity.layers import layer_of
from hf_guidance.similarity.own import find_function, is_own
from hf_guidance.similarity.pair_loss import similarities
from hf_guidance.similarity.registry import get_measure, register_measure

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(registry.REGISTERED)
    yield
    registry.REGISTERED.clear()
    registry.REGISTERED.update(before)


def test_a_name_of_the_form_module_function_is_one_of_the_users_own() -> None:
    assert is_own("package.module:function")
    for name in ("linear_cka", "a:b:c", "os;system:x", ":f", "m:", "a b:c"):
        assert not is_own(name)


@pytest.mark.parametrize("batch", [6, 200])
def test_the_gradient_is_that_of_the_function_on_centred_scaled_features(batch: int) -> None:
    torch.manual_seed(0)
    target, guide, x = nn.Linear(5, 20).double(), nn.Linear(5, 8).double(), torch.randn(batch, 5, dtype=torch.float64)
    layers = {"target_layers": ["**"], "guide_layers": ["**"]}
    target, guide = nn.Sequential(target), nn.Sequential(guide)
    config = linear(measure="own_measures:negative_distance", log_measures=["debiased_cka"], **layers)
    with GuidanceLoss(target, guide, config).watch({"input": x}) as watched:
        target(x)
    watched.loss.backward()
    found = [p.grad.clone() for p in target.parameters()]
    target.zero_grad()
    sides = []
    for network in (target, guide):
        y = network(x)
        y = y - y.mean(0)
        sides.append(y * (batch / y.square().sum()).sqrt())
    expected = 1 - find_function("own_measures:negative_distance")(*sides)
    expected.backward()
    assert watched.loss.item() == pytest.approx(expected.item())
    for p, gradient in zip(target.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert set(watched.similarities) == {"own_measures:negative_distance", "debiased_cka"}


def test_one_can_be_logged_beside_another(registered: None) -> None:
    register_measure("dot", lambda x, y: (x @ x.T * (y @ y.T)).mean())
    target, guide, x = (nn.Sequential(nn.Linear(5, d)) for d in (20, 8)), None, torch.randn(6, 5)
    target, guide = target
    layers = {"target_layers": ["**"], "guide_layers": ["**"]}
    with GuidanceLoss(target, guide, linear(log_measures=["dot"], **layers)).watch({"input": x}) as watched:
        target(x)
    assert list(watched.similarities) == ["linear_cka", "dot"]


def test_no_config_imports_one() -> None:
    GuidanceConfig.from_dict({"measure": "no_such_module:function"})
    with pytest.raises(ValueError, match=r"measure 'no_such_module:function' cannot be imported \(No module named"):
        get_measure("no_such_module:function")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two_numbers", r"returned shape \(2,\); expected a scalar tensor"),
        ("number", r"returned float; expected a scalar tensor"),
        ("nothing", r"returned .* for finite features of shapes \(6, 3\) and \(6, 3\): it must be finite"),
        (
            "constant",
            r"has no gradient in the target's features \(its first argument\): compute it with",
        ),
        ("no_such_function", r"cannot be imported"),
        ("NOT_A_FUNCTION", r"is int; expected a function of two feature matrices"),
    ],
)
def test_what_is_no_measure_is_an_error(name: str, words: str) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    with pytest.raises(ValueError, match=f"measure 'own_measures:{name}' {words}"):
        get_measure(f"own_measures:{name}")(x, x.detach())


def test_broken_features_are_not_the_measures_fault() -> None:
    x = torch.full((6, 3), torch.nan)
    assert get_measure("own_measures:negative_distance")(x, x).isnan()


@pytest.mark.parametrize("measures", [("own_measures:negative_distance", "debiased_cka"), ("linear_cka", "dot")])
def test_beside_one_the_others_still_compare_wide_layers_by_gram_matrices(
    measures: tuple[str, str], registered: None
) -> None:
    register_measure("dot", lambda x, y: (x * x).mean() * (y * y).mean())
    n, d = 8, 3000
    target, guide = nn.Sequential(nn.Linear(5, d)), nn.Sequential(nn.Linear(5, d))
    config = linear(measure=measures[0], log_measures=[measures[1]], target_layers=["**"], guide_layers=["**"])
    x = torch.randn(n, 5)
    with FlopCounterMode(display=False) as counter, GuidanceLoss(target, guide, config).watch({"input": x}) as watched:
        target(x)
    assert set(watched.similarities) == set(measures)
    assert counter.get_total_flops() < 20 * 2 * n * n * d  # and nothing of d × d


def test_a_gradient_that_is_not_finite_is_an_error_and_arguments_may_be_changed() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    with pytest.raises(ValueError, match="has a gradient that is not finite, though its value 0 is: look for a root"):
        get_measure("own_measures:root_of_nothing")(x, x.detach())
    layers = {"": layer_of(torch.randn(6, 3))}
    before = layers[""].values.clone()
    similarities([("", "")], get_measure("own_measures:changing"), layers, layers)
    assert torch.equal(layers[""].values, before)


def test_a_gradient_that_is_one_number_in_memory_is_taken_too() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    get_measure("own_measures:total")(x, x.detach()).backward()
    assert x.grad.abs().max() < 1e-6  # the features are centred, so their sum cannot change


def test_a_function_of_no_two_tensors_is_said_with_what_a_measure_has_to_be() -> None:
    words = "expected a function of two tensors \\(samples, features\\) that returns their similarity, a scalar tensor"
    with pytest.raises(ValueError, match=f"measure 'math:sin' does not take two arguments; {words}"):
        get_measure("math:sin")
    layer = layer_of(torch.randn(4, 3), primal_below=float("inf"))
    with pytest.raises(
        ValueError, match=r"'math:fmod' does not run on .*\(4, 3\) and \(4, 3\): .*a function of two tensors"
    ):
        similarities([("a", "b")], get_measure("math:fmod"), {"a": layer}, {"b": layer})
