"""The recipe of targets by guides, run as a user runs it, in a size of seconds."""

import json

import pytest
from launching import Recipe
from transformers import AutoConfig

TINY = {
    "max_steps": 2,
    "eval_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 16,
    "eval_size": 32,
    "use_cpu": True,
    "targets": ["wide_fcn"],
    "guides": ["fcn", "vit"],
    "seeds": [0],
}
RECIPE = Recipe("which_prior", TINY)


def test_each_target_is_guided_by_each_guide_and_what_is_done_is_kept(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    RECIPE.run_here(monkeypatch, out)
    printed = capsys.readouterr().out
    cells = json.loads((out / "matrix.json").read_text())
    assert list(cells["wide_fcn"]) == ["fcn", "vit"]
    runs = json.loads((out / "wide_fcn" / "results.json").read_text())["runs"]
    test = {run["run"]: run["test"]["accuracy"] for run in runs}
    assert test.keys() == {"alone", "guided_by_fcn", "guided_by_vit"}
    for guide, cell in cells["wide_fcn"].items():
        assert cell["mean"] == pytest.approx(100 * (test[f"guided_by_{guide}"] - test["alone"]))
    assert "| target, guided by | fcn" in printed
    assert (out / "matrix.png").is_file()
    before = (out / "matrix.json").read_text()
    RECIPE.run_here(monkeypatch, out)  # reads what is there
    assert ": 2 steps" not in capsys.readouterr().out
    assert (out / "matrix.json").read_text() == before


def test_a_pair_that_cannot_be_compared_is_said_and_the_others_run(tmp_path, monkeypatch, capsys):
    RECIPE.run_here(monkeypatch, tmp_path / "out", guide_layers=["blocks.1"])  # a ViT has no such layer
    assert "guided_by_vit is left out: guide layer 'blocks.1' not found" in capsys.readouterr().out
    cells = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert cells["wide_fcn"]["vit"] is None
    assert cells["wide_fcn"]["fcn"] is not None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"targets": ["resnet18"]}, "--targets resnet18: possible are deep_fcn"),
        ({"guides": ["resnet19"]}, "--guides resnet19: possible are resnet18, vit, fcn"),
        ({"guides": ["timm/vit", "vit"]}, "two of them have the same name"),
        ({"runs": ["alone"]}, "choose with --targets and --guides"),
        ({"image_size": 0}, "it must be at least 1"),
    ],
)
def test_what_cannot_be_crossed_is_refused(tmp_path, monkeypatch, flags, words):
    with pytest.raises(ValueError, match=words):
        RECIPE.run_here(monkeypatch, tmp_path, **flags)


def test_a_guide_that_cannot_be_loaded_is_left_out_and_the_others_run(tmp_path, monkeypatch, capsys):
    def refuse(source, *args, **kwargs):
        raise OSError(f"{source} is not a local folder, and the Hub cannot be reached")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    RECIPE.run_here(monkeypatch, tmp_path / "out", guides=["fcn", "timm/unknown"])
    words = "guided_by_unknown is left out: timm/unknown is not a local folder, and the Hub cannot be reached"
    assert capsys.readouterr().out.count(words) == 1
    cells = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert cells["wide_fcn"]["unknown"] is None
    assert cells["wide_fcn"]["fcn"] is not None
    with pytest.raises(
        ValueError, match=r"--guides: none can be loaded\. guided_by_unknown is left out: timm/unknown is"
    ):
        RECIPE.run_here(monkeypatch, tmp_path / "other", guides=["timm/unknown"])
