"""The registry of measures: names, penalties, what is registered."""

from __future__ import annotations

import math

import pytest
import torch

from hf_guidance import ridge, ridge_loo
from hf_guidance.similarity import registry
from hf_guidance.similarity.registry import (
    MEASURES,
    check_measure,
    check_takes_sketch,
    get_measure,
    min_samples,
    register_measure,
)


def test_the_penalty_is_that_of_the_function() -> None:
    x, y = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    for name, function in (("ridge", ridge), ("ridge_loo", ridge_loo)):
        assert get_measure(name, 0.5)(x, y) == function(x, y, 0.5) != function(x, y)
        assert get_measure(name)(x, y) == function(x, y)
    assert get_measure("rsa", 0.5) is MEASURES["rsa"]


def test_a_registered_measure_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})
    with pytest.raises(ValueError, match="Unknown measure 'dot'"):
        check_measure("dot")
    register_measure("dot", lambda x, y: (x * y).mean())
    check_measure("dot")
    x = torch.eye(4)
    assert get_measure("dot")(x, x).item() == pytest.approx(0.25)  # of a mean squared norm of 1, over 4 features
    assert (min_samples("dot"), min_samples("any:function"), min_samples("debiased_cka")) == (2, 2, 4)
    assert math.isinf(get_measure("dot").primal_below)


@pytest.mark.parametrize("name", ["linear_cka", "two words", "module:function", ""])
def test_a_name_that_is_taken_or_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be an identifier other than auto, linear_cka, "):
        register_measure(name, lambda x, y: x.sum())


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match="got int for 'three', expected a function of two matrices"):
        register_measure("three", 3)  # type: ignore[arg-type]


def test_only_cosines_of_linear_kernels_take_a_sketch() -> None:
    for name, measure in MEASURES.items():
        if name in ("linear_cka", "debiased_cka"):
            check_takes_sketch(measure)
        else:
            with pytest.raises(ValueError, match=f"{name} takes no sketch"):
                check_takes_sketch(measure)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("cka", "'linear_cka' or 'debiased_cka' or 'rbf_cka'"), ("Linear-CKA", "'linear_cka'"), ("RSA", "'rsa'")],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_ones(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown measure '{name}'; possible are .* Did you mean {meant}"):
        check_measure(name)
