"""Flags that all recipes share."""

import pytest

from hf_guidance.experiments.arguments import RecipeArguments


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
