"""The cost recipe, run as a user runs it, in a size of seconds."""

import json
import runpy
import sys

import pytest
import torch
from builders import llama_config
from launching import REPOSITORY, Recipe
from transformers import GPT2Config, TrainingArguments, ViTConfig

from hf_guidance import GuidanceConfig

TINY = {
    "depth": 3,
    "guide": "timm/test_resnet",
    "rows": "8/32/8",
    "rounds": 1,
    "steps": 1,
    "batches": 1,
    "use_cpu": True,
}
BARE = {"rows": [], "depth": []}
RECIPE = Recipe("guidance_cost", TINY)
SCRIPT = REPOSITORY / "recipes" / "guidance_cost.py"


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_here(monkeypatch, folder, **options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *RECIPE.flags(folder, **options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return json.loads((folder / "cost.json").read_text())


def test_launched_it_prints_the_table_and_saves_what_it_was_made_with(tmp_path):
    folder = tmp_path / "out"
    process = RECIPE.launch(folder)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed[-3000:]
    report = json.loads((folder / "cost.json").read_text())
    assert f"| 8/32/8  | {report['rows'][0]['plain']['median']:.4f} " in printed
    assert report["command"].startswith("accelerate launch recipes/guidance_cost.py --depth 3 --guide timm/test_resnet")
    assert report["seed"] == 42
    environment = report["environment"]
    assert (environment["torch"], environment["threads"]) == (torch.__version__, 1)
    assert {"python", "transformers", "accelerate", "device"} <= set(environment)
    assert report["guidance"]["guide_layers"] == ["Conv2d"]
    assert report["rows"][0]["goal"] is None
    assert str(tmp_path) not in json.dumps(report)


def test_each_row_has_a_cache_of_its_own(tmp_path, monkeypatch):
    cached = {"sketch": 4, "cache_guide": tmp_path / "cache", "sample_id_column": "id", "skip_paper": True}
    report = run_here(monkeypatch, tmp_path / "out", rows=["8/32/8", "4/32/8"], **cached)
    assert [row["guide_forwards"] for row in report["rows"]] == [0, 0]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"8-32-8", "4-32-8"}


def test_steps_of_several_batches_are_whole(tmp_path, monkeypatch):
    report = run_here(monkeypatch, tmp_path / "out", batches=1, gradient_accumulation_steps=3, skip_paper=True)
    assert report["rows"][0]["guide_forwards"] == 3
    assert report["rows"][0]["guided"]["samples_per_second"] == pytest.approx(
        24 / report["rows"][0]["guided"]["median"]
    )


def test_batch_sizes_are_measured_one_by_one_and_drawn(tmp_path, monkeypatch):
    options = {"rows": [], "image_size": 32, "width": 8, "batch_sizes": [4, 8], "skip_paper": True}
    report = run_here(monkeypatch, tmp_path / "out", plot=True, measure="ridge", **options)
    assert [row["name"] for row in report["rows"]] == ["4/32/8", "8/32/8"]
    assert all("paper" not in row and "arithmetic" not in row for row in report["rows"])
    assert report["guidance"]["measure"] == "ridge"
    assert (tmp_path / "out" / "overhead.png").stat().st_size > 5_000


@pytest.mark.parametrize("kind", ["text", "images", "timm", "plain_resnet"])
def test_other_targets_and_guides(kind, tmp_path, monkeypatch):
    options = {**BARE, "batch_sizes": [4], "bf16": kind == "text", "skip_paper": kind != "text"}
    if kind == "text":
        GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=16).save_pretrained(tmp_path / "target")
        llama_config().save_pretrained(tmp_path / "guide")
        options |= {"target": tmp_path / "target", "guide": tmp_path / "guide", "length": 12}
    elif kind == "images":
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        ViTConfig(image_size=24, patch_size=8, **small).save_pretrained(tmp_path / "target")
        options |= {"target": tmp_path / "target", "guide_image_size": 32}
    elif kind == "timm":
        options |= {"target": "timm/test_resnet", "image_size": 16}
    else:
        options |= {"target": "resnet50_without_skips", "depth": 18, "image_size": 16}
    report = run_here(monkeypatch, tmp_path / "out", **options)
    assert report["rows"][0]["guide_forwards"] == 1
    assert report["rows"][0]["pairs"] == (3 if kind == "text" else 15)  # layers, or convolutions
    assert str(tmp_path) not in json.dumps(report)


def test_all_rows_with_goals_have_one_name(monkeypatch):
    recipe = runpy.run_path(str(SCRIPT))
    arguments = recipe["Arguments"]
    found = recipe["settings"](arguments(rows=["table", "8/32/8"]), 64)
    assert [setting.name for setting in found[:4]] == list(recipe["GOALS"])
    assert found[4].width == 8
    usual = recipe["settings"](arguments(), 64)[0]
    assert (usual.batch_size, usual.image_size, usual.width) == (64, 64, None)


def test_goals_stand_beside_what_they_are_of_only(tmp_path):
    recipe = runpy.run_path(str(SCRIPT))
    goal_of, arguments = recipe["goal_of"], recipe["Arguments"]
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    (row,) = recipe["settings"](arguments(rows=["256/32/256"]), 64)
    exact = GuidanceConfig(measure="linear_cka", guide_layers=["Conv2d"])
    assert goal_of(arguments(), args, exact, row) == 1.15
    assert goal_of(arguments(), args, GuidanceConfig(measure="ridge", guide_layers=["Conv2d"]), row) is None
    assert goal_of(arguments(depth=3), args, exact, row) is None
    assert goal_of(arguments(threads=2), args, exact, row) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": "8/32"}, "--rows 8/32: expected batch/image/width, such as 64/64/512, or table"),
        ({"batch_sizes": [4]}, "--rows names batch, image size and width: leave --batch_sizes out"),
        ({"image_size": 32, "width": 8}, "leave --image_size, --width out"),
        (
            {"similarity_batch": "global"},
            "--similarity_batch global needs several processes, but this recipe measures one: leave it out",
        ),
        ({"batches": 0}, "--batches is 0; it must be at least 1"),
        ({"threads": 0}, "--threads is 0; it must be at least 1"),
        ({"target": "deepfcn"}, "target 'deepfcn' is none of deep_fcn, wide_fcn"),
        ({"max_steps": 3}, "--max_steps: use --rounds and --steps instead"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"target": "/nowhere/at/all", **BARE}, "target '/nowhere/at/all' is none of deep_fcn, wide_fcn"),
        ({"target": "timm/test_resnet"}, "width and depth apply to deep_fcn, wide_fcn, resnet50_without_skips only"),
        ({"target": "resnet50_without_skips"}, "width applies to the FCNs only; a ResNet takes depth 18, 34 or 50"),
        ({"guide": "/nowhere/at/all"}, "Cannot load guide '/nowhere/at/all'"),
        ({"guide_layers": "Conv3d"}, "guide layer 'Conv3d' not found; the guide has"),
        ({"measure": "linear_ckka"}, "Unknown measure 'linear_ckka'.*Did you mean 'linear_cka'"),
        ({"rows": "2/32/8"}, "linear_cka needs at least 3 samples a batch"),
        ({"guide": "timm/vit_tiny_patch16_224", "guide_image_size": 30}, "choose another guide_image_size"),
    ],
)
def test_bad_flags_are_named(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts to reach a Hub
    with pytest.raises(ValueError, match=words):
        run_here(monkeypatch, tmp_path / "out", **options)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*file/out cannot be written .*: name another folder"):
        run_here(monkeypatch, tmp_path / "file" / "out", target="/nowhere/at/all")


def test_more_than_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda args: 2))
    with pytest.raises(ValueError, match=r"2 processes: this recipe measures one process\. Start one, with one GPU"):
        run_here(monkeypatch, tmp_path / "out")
