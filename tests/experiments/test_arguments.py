"""Flags that all recipes share."""

import sys

import pytest

from hf_guidance.experiments.arguments import RecipeArguments, check_numbers
from hf_guidance.experiments.command_line import parse


def test_only_what_was_given_for_the_guide_changes_its_training():
    assert RecipeArguments().guide_training() == {}
    assert RecipeArguments(guide_max_steps=7).guide_training() == {"max_steps": 7}


def test_guidance_stops_after_a_third_or_where_told():
    assert RecipeArguments().initialisations(["alone"], 10)["_stopped"] == {"guidance_stop_step": 3}
    assert RecipeArguments(stop_step=7).initialisations(["a_stopped"], 10)["_stopped"] == {"guidance_stop_step": 7}
    assert RecipeArguments().initialisations(["a_stopped"], 1)["_stopped"] == {"guidance_stop_step": 1}


@pytest.mark.parametrize("step", [0, 10, -1])
def test_a_stop_outside_the_steps_is_refused(step):
    with pytest.raises(ValueError, match="choose from 1 to 9"):
        RecipeArguments(stop_step=step).initialisations(["a_stopped"], 10)
    RecipeArguments(stop_step=step).initialisations(["alone"], 10)  # no run stops


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"learning_rates": [0.1, float("nan")]}, "^--learning_rates is nan; a learning rate is a finite number above"),
        ({"learning_rates": [float("inf")]}, "^--learning_rates is inf"),
        ({"learning_rates": [0.0]}, "^--learning_rates is 0;"),
        ({"guide_learning_rate": -0.1}, "^--guide_learning_rate is -0.1;"),
        ({"seeds": [0, -1]}, "^--seeds names -1; a seed is an integer from 0 to 4294967295"),
        ({"search_seeds": [2**32]}, "^--search_seeds names 4294967296;"),
        ({"seeds": [0, 0]}, "^--seeds 0 0 names a seed twice"),
        ({"search_seeds": [7, 8, 7]}, "^--search_seeds 7 8 7 names a seed twice"),
    ],
)
def test_a_rate_or_a_seed_that_no_run_could_take_is_an_error_of_one_line(flags, words, monkeypatch):
    with pytest.raises(ValueError, match=words):
        check_numbers(RecipeArguments(**flags))
    given = [
        word for name, value in flags.items() for word in (f"--{name}", *map(str, [value] if name[0] == "g" else value))
    ]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *given])
    with pytest.raises(ValueError, match=words):  # before anything is built
        parse("", RecipeArguments, lambda recipe: pytest.fail("it went on"), refused=(), instead="")


def test_the_largest_seed_and_a_small_rate_are_fine():
    check_numbers(RecipeArguments(learning_rates=[1e-9], guide_learning_rate=1.0, seeds=[0, 2**32 - 1]))
