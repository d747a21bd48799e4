"""A recipe from its flags to its report, and what of it is pushed."""

import sys

import pytest
import torch
from launching import Recipe

from hf_guidance.experiments import cards, comparison
from hf_guidance.experiments.recipe import RecipeArguments, launch, training_defaults
from hf_guidance.trainer import card_mixin

TINY = {
    "max_steps": 2,
    "eval_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "eval_size": 8,
    "use_cpu": True,
    "runs": ["alone", "untrained_guide"],
}
PUSHED = {"push_to_hub": True, "hub_model_id": "me/net", "hub_strategy": "end"}
RECIPE = Recipe("rnn_vs_transformer", TINY)


@pytest.fixture
def counted(monkeypatch):
    """Counts the cards that are rendered, and the times that the facts of a run are gathered."""
    calls = []

    def counting(name, work):
        return lambda *args, **kwargs: (calls.append(name), work(*args, **kwargs))[1]

    for module in (cards, card_mixin):
        monkeypatch.setattr(module, "render", counting("card", module.render))
    for module in (comparison, card_mixin):
        monkeypatch.setattr(module, "run_facts", counting("facts", module.run_facts))
    return calls


def test_the_card_of_a_pushed_run_is_gathered_rendered_and_committed_once(tmp_path, monkeypatch, uploads, counted):
    RECIPE.run_here(monkeypatch, tmp_path / "out", **PUSHED)
    assert counted == ["facts", "card"]
    ((title, contents),) = uploads
    assert title == "End of training"
    assert contents.keys() >= {"model.safetensors", "config.json", "guidance_config.json", "tokenizer.json"}
    assert contents.keys() >= {"README.md", "curves.png", "comparison.png", "similarity.png"}
    assert contents.keys() & {"result.json", "settings.json", "training_args.bin"} == set()
    card = contents["README.md"].decode()
    assert "# net-untrained-guide-seed0\n" in card
    assert "| untrained guide | 0     | 2     |" in card
    place = tmp_path / "out" / "seed-0" / "untrained_guide"
    assert (place / "README.md").read_text() == card
    assert (place / "model.safetensors").read_bytes() == contents["model.safetensors"]
    assert not (place / "_push").exists()
    RECIPE.run_here(monkeypatch, tmp_path / "out", **PUSHED)  # the run is read, and its model is there already
    assert counted == ["facts", "card", "card"]
    assert uploads[1][0] == "Card with the runs it is compared with"
    assert uploads[1][1].keys() == {"README.md", "curves.png", "comparison.png", "similarity.png"}


def test_a_push_that_fails_is_an_error_after_all_else_is_written_and_said(tmp_path, monkeypatch, uploads, capsys):
    def refuse(self, **_):
        raise OSError("no Hub today")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    with pytest.raises((ConnectionError, SystemExit), match="me/net-untrained-guide-seed0: not pushed"):
        RECIPE.run_here(monkeypatch, tmp_path / "out", **PUSHED)
    printed = capsys.readouterr().out
    assert "| untrained guide | 0     | 2     |" in printed
    place = tmp_path / "out" / "seed-0" / "untrained_guide"
    assert (place / "_push" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "results.json").is_file()


def test_defaults_validate_twenty_times_and_log_forty_times():
    values = training_defaults(400, 32, 1e-3)
    assert (values["eval_steps"], values["logging_steps"], values["save_steps"]) == (20, 10, 100)
    assert (values["per_device_eval_batch_size"], values["lr_scheduler_type"]) == (64, "constant")
    few = training_defaults(3, 1, 1e-3)
    assert (few["eval_steps"], few["logging_steps"], few["save_steps"]) == (1, 1, 1)


def test_only_given_flags_change_the_guides_own_training():
    assert RecipeArguments().guide_training() == {}
    assert RecipeArguments(guide_max_steps=5).guide_training() == {"max_steps": 5}
    both = RecipeArguments(guide_learning_rate=0.5, guide_max_steps=5)
    assert both.guide_training() == {"learning_rate": 0.5, "max_steps": 5}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Stopped. Results so far are in"),
        (ConnectionError("The Hub is gone."), None, "The Hub is gone.\nRerun the same command to resume from"),
    ],
)
def test_an_interrupted_recipe_says_how_to_go_on(error, code, words, tmp_path, monkeypatch, capsys):
    def build(recipe, args):
        raise error

    monkeypatch.setattr(sys, "argv", ["recipe.py", "--output_dir", str(tmp_path), "--use_cpu", "--max_steps", "1"])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stopped:
        launch("about", RecipeArguments, lambda recipe: {"eval_strategy": "steps", "eval_steps": 1}, build)
    torch.set_num_threads(threads)
    assert words in (capsys.readouterr().err if code else str(stopped.value.code))
    assert not code or stopped.value.code == code
