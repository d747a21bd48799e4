"""A recipe from its flags to its report, and what of it is pushed."""

import sys

import pytest
import torch
from launching import Recipe

from hf_guidance.experiments import cards, comparison
from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.recipe import launch, training_defaults
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


def launched(monkeypatch, folder, error):
    """Launch a recipe whose data raise an error."""

    def build(recipe, args):
        raise error

    monkeypatch.setattr(sys, "argv", ["recipe.py", "--output_dir", str(folder), "--use_cpu", "--max_steps", "1"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    threads = torch.get_num_threads()
    try:
        launch("about", RecipeArguments, lambda recipe: {"eval_strategy": "steps", "eval_steps": 1}, build)
    finally:
        torch.set_num_threads(threads)


def test_an_interrupted_recipe_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        launched(monkeypatch, tmp_path, KeyboardInterrupt())
    assert stopped.value.code == 130
    assert "Stopped. Results so far are in" in capsys.readouterr().err


def test_a_lost_connection_says_how_to_resume_only_what_has_begun(tmp_path, monkeypatch):
    lost = ConnectionError("Caught in a worker\nTraceback …\nThe Hub is gone.")
    with pytest.raises(ConnectionError, match=r"^The Hub is gone\.$"):
        launched(monkeypatch, tmp_path, lost)
    begun = tmp_path / "seed-0" / "alone"
    begun.mkdir(parents=True)
    (begun / "settings.json").write_text("{}")
    words = r"^The Hub is gone\. Rerun the same command to resume from the start of that run; see "
    with pytest.raises(ConnectionError, match=words):
        launched(monkeypatch, tmp_path, lost)
    (begun / "result.json").write_text("{}")
    with pytest.raises(ConnectionError, match=r"^The Hub is gone\.$"):
        launched(monkeypatch, tmp_path, lost)


def test_a_folder_that_cannot_be_written_is_an_error_before_the_data_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--output_dir .*file/out cannot be written \(Not a directory\): name another"
    ):
        launched(monkeypatch, tmp_path / "file" / "out", AssertionError("the data were read"))
