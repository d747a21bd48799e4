"""The card that a trainer writes beside its figures, and the arguments that it saves."""

import re

import pytest
import torch
from builders import gpt2, llama, token_rows
from cards import check_card
from trainers import make_trainer

from hf_guidance.trainer import card_mixin, run_facts


@pytest.mark.parametrize("matplotlib", [True, False])
def test_curves_are_beside_the_card_where_they_can_be_drawn(matplotlib, tmp_path, monkeypatch):
    monkeypatch.setattr(card_mixin, "is_matplotlib_available", lambda: matplotlib)
    words = ["python", "train.py", "--lr", "0.1", "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(run_facts, "command_line", lambda: words if matplotlib else None)
    own = make_trainer(tmp_path / "out", gpt2(), llama(), eval_dataset=token_rows(), sample_axis="token")
    own.train()
    own.create_model_card()
    _, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert (tmp_path / "out" / "curves.png").is_file() == ("(curves.png)" in body) == matplotlib
    assert not re.search("## Results|codecarbon|CO₂|similarity.png", body)  # none was measured
    command = "## How to reproduce it\n\n```sh\npython train.py --max_steps 2 --output_dir out\n```\n\n"
    command += "Arguments other than the known training settings are left out.\n"
    assert (command in body) == ("## How to reproduce it" in body) == matplotlib


def test_the_code_of_a_card_that_is_in_no_repository_runs_in_its_folder(tmp_path, monkeypatch, capsys):
    own = make_trainer(tmp_path / "out", gpt2(), llama())
    own.train()
    own.save_model()
    own.create_model_card()
    _, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert "the code runs in the folder of this card, beside the weights." in body
    monkeypatch.chdir(tmp_path / "out")
    exec(re.search(r"```python\n(.*?)```", body, re.DOTALL)[1], {})
    assert "\ntensor([" in capsys.readouterr().out


def test_a_figure_that_cannot_be_drawn_costs_the_card_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(card_mixin, "plot_run", lambda *args: 1 / 0)
    own = make_trainer(tmp_path / "out", gpt2(), llama())
    own.train()
    own.create_model_card()
    _, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert "curves.png" not in body
    assert "curves.png could not be drawn" in caplog.text


def test_without_a_guide_transformers_writes_its_own_card_unless_there_are_facts_for_ours(tmp_path):
    own = make_trainer(tmp_path / "out", gpt2())
    own.train()
    own.create_model_card()
    assert "generated automatically" in (tmp_path / "out" / "README.md").read_text()
    own.card_facts = {"license": "mit"}
    own.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "generated automatically" not in card
    assert "\nlicense: mit\n" in card


def test_what_is_given_to_the_card_counts_more_than_the_trainers_facts(tmp_path):
    own = make_trainer(tmp_path / "out", gpt2(), llama())
    own.card_facts = {"license": "mit", "model_name": "known"}
    own.train()
    own.create_model_card(model_name="given")
    metadata, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert metadata["license"] == "mit"
    assert "# given\n" in body


def test_a_card_is_no_link_to_a_file_elsewhere(tmp_path):
    own = make_trainer(tmp_path / "out", gpt2(), llama())
    own.train()
    (tmp_path / "mine.md").write_text("mine")
    (tmp_path / "out" / "README.md").unlink(missing_ok=True)
    (tmp_path / "out" / "README.md").symlink_to(tmp_path / "mine.md")
    own.create_model_card()
    assert (tmp_path / "mine.md").read_text() == "mine"
    assert (tmp_path / "out" / "README.md").read_text() != "mine"


def test_saved_arguments_have_neither_token_nor_path(tmp_path):
    own = make_trainer(tmp_path / "out", gpt2(), llama(), hub_token="hf_" + 20 * "a")
    own.save_model()
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (saved.hub_token, saved.output_dir) == (None, "out")
    assert (own.args.hub_token, own.args.output_dir) == ("hf_" + 20 * "a", str(tmp_path / "out"))
