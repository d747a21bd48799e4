"""The runs of a recipe are checked before the first is trained."""

from types import SimpleNamespace

import pytest
from builders import arguments, linear

from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.recipe_runs import Setup, check_plan, check_seeds
from hf_guidance.experiments.run import SETTINGS, Run
from hf_guidance.experiments.run_training import RESULT


def setup_of(*names):
    task = SimpleNamespace(name="numbers")
    guides = {name: (lambda: None) if name == "guided" else None for name in names}
    return Setup(task, {}, lambda: None, lambda seed: [Run(n, seed, lambda: None, g) for n, g in guides.items()])


@pytest.mark.parametrize(
    ("names", "flags", "words"),
    [
        (["guided"], {"equal_time_baseline": True}, "but --runs does not name it: add alone to --runs"),
        (["alone", "guided"], {"equal_time_to": "alone"}, r"alone is none of the guided runs \(guided\)"),
        (["alone", "guided"], {"equal_time_to": "guided"}, "add --equal_time_baseline"),
        (["alone"], {"equal_time_baseline": True}, "needs a guided run, whose time it takes"),
        (["alone"], {"dimension_rows": 2}, "--dimension_rows is 2; a dimension needs at least 3 rows"),
        (["alone"], {"film_steps": 0}, "--film_steps is 0; a film needs"),
    ],
)
def test_flags_that_do_not_go_with_the_runs_are_named(names, flags, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check_plan(RecipeArguments(**flags), arguments(tmp_path), linear(), setup_of(*names))


def test_a_seed_that_chooses_and_reports_is_named():
    with pytest.raises(ValueError, match="--seeds and --search_seeds both name 100"):
        check_seeds(RecipeArguments(learning_rates=[1.0], seeds=[3, 100]))
    check_seeds(RecipeArguments(learning_rates=[1.0], seeds=[3]))
    check_seeds(RecipeArguments(seeds=[3, 100]))  # no rate is chosen


def test_other_settings_of_any_seed_are_found_first(tmp_path):
    place = tmp_path / "seed-1" / "alone"
    place.mkdir(parents=True)
    (place / SETTINGS).write_text("{}")
    check_plan(RecipeArguments(seeds=[0]), arguments(tmp_path), linear(), setup_of("alone"))
    with pytest.raises(ValueError, match=f"{place} holds a run with another version of hf_guidance or transformers"):
        check_plan(RecipeArguments(seeds=[0, 1]), arguments(tmp_path), linear(), setup_of("alone"))


def test_a_record_that_is_none_is_found_first(tmp_path):
    place = tmp_path / "seed-1" / "alone"
    place.mkdir(parents=True)
    (place / RESULT).write_text('{"run": "alone"}')
    with pytest.raises(ValueError, match=f"^{place / RESULT} lacks seed, steps, "):
        check_plan(RecipeArguments(seeds=[0, 1]), arguments(tmp_path), linear(), setup_of("alone"))
