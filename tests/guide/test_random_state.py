"""Random states of torch, Python and numpy are read, set and kept."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_guidance.guide.random_state import drawn_from, kept_random_state, random_state, set_random_state


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def fail_after_drawing(values: list[float]) -> None:
    values[:] = draw()
    raise KeyError


def test_what_is_drawn_in_the_context_is_drawn_again_after_it_also_after_an_error() -> None:
    with kept_random_state():
        inside = draw()
    assert draw() == inside
    with pytest.raises(KeyError), kept_random_state():
        fail_after_drawing(inside)
    assert draw() == inside


def test_torch_goes_on_from_the_state_that_is_set() -> None:
    before = random_state()
    first = torch.rand(3)
    assert not torch.equal(torch.rand(3), first)
    set_random_state(before)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.rand])
def test_a_drawn_number_changes_the_drawn_from(draw) -> None:
    before = drawn_from()
    assert drawn_from() == before
    draw()
    assert drawn_from() != before
