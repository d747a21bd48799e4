"""The vision recipe, run as a user runs it, in a size of seconds."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch
from hub import Hub
from images import imagenet_files, imagenet_rows, parquet, truncate, write
from launching import CONFIGS, Recipe, on_one_cpu, resumes_on_several_cpus
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_guidance.guide.identity import fingerprint
from hf_guidance.guide.loading import load_guide
from hf_guidance.trainer.checkpoints import last_complete_checkpoint

TINY = {
    "max_steps": 4,
    "eval_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "per_device_train_batch_size": 16,
    "width": 16,
    "depth": 4,
    "guide": "timm/test_resnet",  # a tenth of the parameters of the smallest real one
    "untrained_guide": True,
    "eval_size": 32,
    "use_cpu": True,
}
ONE_STEP = {"max_steps": 1, "eval_steps": 1, "save_steps": 1}
RECIPE = Recipe("fcn_vs_resnet", TINY)
run_here, launch = RECIPE.run_here, RECIPE.launch


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write(tmp_path_factory.mktemp("imagenet"), imagenet_files(train=96))


def test_every_run_of_the_comparison_on_digits(tmp_path):
    folder = tmp_path / "out"
    kinds = ["untrained_guide", "trained_guide", "untrained_guide_stopped", "trained_guide_stopped"]
    controls = ["shuffled_guide", "noise_guide", "reversed_layers", "own_architecture", "distillation"]
    runs = ["alone", *kinds, *controls, "guide_itself"]
    process = launch(folder, train_guide=True, runs=runs, longer_baseline=True, guide_image_size=32)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    report = json.loads((folder / "results.json").read_text())
    by_name = {run["run"]: run for run in report["runs"]}
    assert set(by_name) == {*runs, "alone_longer"}
    for name in runs:
        assert re.search(rf"^\| {name.replace('_', ' ')} +\| 0 ", printed, re.MULTILINE)
        assert {"accuracy", "top_5_accuracy", "loss"} <= set(by_name[name]["test"])
    for picture in ("comparison.png", "similarity.png"):
        assert (folder / picture).stat().st_size > 10_000
    assert [by_name[kind]["settings"]["guidance"]["guidance_stop_step"] for kind in kinds] == [None, None, 1, 1]
    assert by_name["shuffled_guide"]["settings"]["guidance"]["guide_input"] == "shuffled"
    trained = folder / "seed-0" / "guide_itself"
    assert by_name["trained_guide"]["guide"]["fingerprint"] == fingerprint(load_guide(trained))
    assert by_name["untrained_guide"]["guide"]["untrained"]
    assert by_name["distillation"]["guide"] is None
    own = by_name["own_architecture"]["guide"]
    assert own["architecture"].startswith("FCN")
    assert own["untrained"]
    reversed_layers = by_name["reversed_layers"]
    assert reversed_layers["settings"]["guidance"]["layer_mapping"] == "reversed"
    assert reversed_layers["guide"]["fingerprint"] == by_name["trained_guide"]["guide"]["fingerprint"]
    card = (folder / "seed-0" / "untrained_guide" / "README.md").read_text()
    assert re.search(r"\| alone, equal time +\| 0 ", card)
    assert re.search(r"\| untrained guide +\| 0 ", card)
    assert "trained guide stopped" not in card
    assert f"| {by_name['untrained_guide']['test']['accuracy']:.4f} " in card
    assert not re.search(rf"\bNone\b|\bnan\b|{{{{|{re.escape(str(tmp_path))}", card)
    assert (folder / "seed-0" / "untrained_guide" / "similarity.png").is_file()
    guided = by_name["untrained_guide"]["similarity_maps"]["after"]
    convolutions = len(guided["guide_layers"])
    assert convolutions == sum(isinstance(m, torch.nn.Conv2d) for m in load_guide(trained).modules())
    assert len(guided["pairs"]) == convolutions == len(by_name["untrained_guide"]["similarity"][0]) - 1
    assert torch.tensor(guided["similarity"]).shape == (4, convolutions)
    for saved in ("alone", "guide_itself"):
        processor = AutoImageProcessor.from_pretrained(folder / "seed-0" / saved)
        assert processor.crop_size["height"] == (32 if saved == "guide_itself" else 8)
        AutoModelForImageClassification.from_pretrained(folder / "seed-0" / saved)


def test_a_guide_that_is_left_out_is_the_papers_with_random_weights_read_from_the_names(tmp_path, monkeypatch):
    tiny = {name: value for name, value in TINY.items() if name not in ("guide", "untrained_guide")}
    report = Recipe("fcn_vs_resnet", tiny).run_here(monkeypatch, tmp_path / "out", max_steps=1)
    assert [run["run"] for run in report["runs"]] == ["alone", "untrained_guide"]
    guide = report["runs"][1]["guide"]
    assert (guide["source"], guide["untrained"], guide["seed"]) == ("timm/resnet18", True, 0)
    assert len(report["runs"][1]["similarity"][0]) - 1 == 20  # the convolutions of a ResNet-18


NOISE = {"prealign_steps": 1, "guide_input": "prealign_noise", "max_steps": 2}


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"target": "wide_fcn", "depth": 3, **ONE_STEP}, "FCNForImageClassification"),
        (
            {"target": "resnet50_without_skips", "width": [], "depth": 18, "image_size": 16, **ONE_STEP},
            "PlainResNetForImageClassification",
        ),
        ({**NOISE, "guide_batch_norm": "batch", "bf16": True}, "FCNFor"),
        ({**NOISE, "guide_image_size": 24}, "FCNFor"),
    ],
)
def test_other_targets_and_every_guidance_field_as_a_flag(options, target, tmp_path, monkeypatch):
    report = run_here(monkeypatch, tmp_path / "out", **options)
    assert report["runs"][0]["target"].startswith(target)
    assert [run["run"] for run in report["runs"]] == ["alone", "untrained_guide"]


def test_another_network_guide_or_data_in_the_same_folder_is_refused(imagenet, tmp_path, monkeypatch):
    data = {"image_size": 16, "eval_size": 8, **ONE_STEP}
    run_here(monkeypatch, tmp_path / "out", dataset=imagenet, **data)
    for change, words in (
        ({"width": 8}, r"network\.hidden_size"),
        ({"guide": "timm/resnet18"}, r"data\.guide_source"),
        ({"dataset": write(tmp_path / "x" / Path(imagenet).name, imagenet_files(train=90))}, r"data\.dataset"),
    ):
        with pytest.raises(ValueError, match=rf"other settings: .*{words}\S* was .*, is "):
            run_here(monkeypatch, tmp_path / "out", **{"dataset": imagenet, **data, **change})


def test_a_result_is_kept_though_what_comes_after_it_fails(imagenet, tmp_path, monkeypatch):
    import hf_guidance.experiments.comparison as comparison

    calls, look = [], comparison.LayerMaps.compute

    def fail_after_training(self, trainer, when):
        calls.append(when)
        if when == "after":
            raise MemoryError("no room for the map")
        look(self, trainer, when)

    monkeypatch.setattr(comparison.LayerMaps, "compute", fail_after_training)
    options = {"dataset": imagenet, "image_size": 16, "eval_size": 8, "max_steps": 2, "runs": ["untrained_guide"]}
    with pytest.raises(MemoryError):
        run_here(monkeypatch, tmp_path / "out", **options)
    report = run_here(monkeypatch, tmp_path / "out", **options)  # read, not run again
    assert calls == ["before", "after"]
    assert report["runs"][0]["steps"] == 2


def test_each_guided_run_has_a_cache_of_its_own_which_a_run_anew_only_reads(imagenet, tmp_path, monkeypatch, capsys):
    options = {"cache_guide": tmp_path / "features", "sketch": 8, "sample_id_column": "id", "guide_image_size": 16}
    options |= {"measure": "linear_cka"}
    options |= {"dataset": imagenet, "image_size": 16, "eval_size": 8, "runs": ["untrained_guide"]}
    options |= {"max_steps": 6, "eval_steps": 6, "save_steps": 6}  # each of the 96 images once
    reports = [run_here(monkeypatch, tmp_path / name, **options) for name in ("first", "again")]
    assert "The guide's features will take" in capsys.readouterr().out
    folder = tmp_path / "features" / "seed-0" / "untrained_guide"
    assert {path.name for path in folder.iterdir()} == {"cache.json", "rows.bin", "scales.npz", "create.lock"}
    similarities = [[run["similarity"] for run in report["runs"] if run["guide"]] for report in reports]
    assert similarities[0] == similarities[1]
    assert str(tmp_path) not in json.dumps(reports[0]["runs"])
    with pytest.raises(ValueError, match="augmentation is 'crop_flip': set augmentation='none', or leave cache_guide"):
        run_here(monkeypatch, tmp_path / "augmented", augmentation="crop_flip", **options)


def test_a_guide_that_is_there_already_distils_on_the_images_it_was_trained_on(tmp_path, monkeypatch):
    from transformers import AutoModelForImageClassification, CLIPImageProcessor, ViTConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    for name, labels in (("ten", 10), ("seven", 7)):
        config = ViTConfig(image_size=16, patch_size=8, num_labels=labels, **sizes)
        AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / name)
        processor = CLIPImageProcessor(crop_size=16, image_mean=[0.1] * 3, image_std=[0.7] * 3)
        processor.save_pretrained(tmp_path / name)
    options = {"guide": tmp_path / "ten", "untrained_guide": False, "runs": ["distillation"], "max_steps": 1}
    data = run_here(monkeypatch, tmp_path / "out", **options)["runs"][0]["settings"]["data"]
    assert data["guide"] == {"size": 16, "mean": [0.1] * 3, "std": [0.7] * 3}
    assert data["target"] == {"size": 8, "mean": [0.1] * 3, "std": [0.7] * 3}
    with pytest.raises(ValueError, match=r"the same classes: .*seven has 7 and the data has 10\. Choose a guide"):
        run_here(monkeypatch, tmp_path / "other", **options | {"guide": tmp_path / "seven"})
    assert not (tmp_path / "other").exists()


def test_layer_pairs_and_bare_flags(imagenet, tmp_path, monkeypatch):
    options = {"dataset": imagenet, "image_size": 16, "eval_size": 8, "max_steps": 1, "runs": ["untrained_guide"]}
    pair = "hidden_states.2~timm_model.conv1.0"
    words = [*RECIPE.flags(tmp_path / "out", **options, layer_pairs=[pair]), "--streaming"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE.path), *words])
    with on_one_cpu():
        runpy.run_path(str(RECIPE.path), run_name="__main__")
    run = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    assert run["settings"]["data"]["streaming"] is True
    assert set(run["similarity"][0]) == {"step", pair}


@pytest.mark.parametrize("kind", ["vit", "convnext", "swin", "dinov2"])
def test_vision_models_of_transformers_guide_from_a_folder_in_a_size_of_their_own(kind, tmp_path, monkeypatch):
    from transformers import ConvNextConfig, Dinov2Config, SwinConfig, ViTConfig

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = {
        "vit": ViTConfig(image_size=24, patch_size=8, **small),
        "convnext": ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1]),
        "swin": SwinConfig(image_size=32, patch_size=4, window_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2]),
        "dinov2": Dinov2Config(image_size=28, patch_size=14, mlp_ratio=1, **small),
    }[kind]
    config.save_pretrained(tmp_path / "guide")
    size = 32 if kind == "convnext" else config.image_size
    report = run_here(monkeypatch, tmp_path / "out", guide=tmp_path / "guide", guide_image_size=size, max_steps=2)
    pairs = [key for key in report["runs"][1]["similarity"][0] if key != "step"]
    assert all("hidden_states" in pair.split("~")[1] for pair in pairs)
    assert str(tmp_path) not in json.dumps(report["runs"])


def test_imagenet_streams_from_a_folder_and_goes_on_after_a_stop_to_the_same_weights(imagenet, tmp_path, monkeypatch):
    options = {
        "dataset": imagenet,
        "streaming": True,
        "image_size": 16,
        "augmentation": "crop_flip",
        "shuffle_buffer": 20,
        "runs": ["untrained_guide"],
        "max_steps": 10,  # more than the six batches of an epoch
        "save_steps": 8,
        "save_total_limit": 2,
        "eval_size": 8,
        "dropout": 0.1,
    }
    unbroken = run_here(monkeypatch, tmp_path / "out", **options)["runs"][0]
    stopped = tmp_path / "out" / "seed-0" / "untrained_guide"
    for name in ("result.json", "model.safetensors", "checkpoint-10"):
        os.rename(stopped / name, tmp_path / name)
    saved = (stopped / "checkpoint-8" / "trainer_state.json").stat().st_mtime_ns
    resumed = run_here(monkeypatch, tmp_path / "out", **options)["runs"][0]
    assert (stopped / "checkpoint-8" / "trainer_state.json").stat().st_mtime_ns == saved  # it went on from there
    assert (stopped / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert resumed["test"]["loss"] == unbroken["test"]["loss"]
    assert "imagenet" not in json.dumps(unbroken["settings"]["data"]).replace(os.path.basename(imagenet), "")


def test_the_papers_preset_is_of_imagenets_size(imagenet, tmp_path, monkeypatch):
    options = {"preset": "paper", "dataset": imagenet, "max_steps": 1, "eval_steps": 1, "save_steps": 1, "depth": 2}
    run = run_here(monkeypatch, tmp_path / "out", width=4, eval_size=8, runs=["untrained_guide"], **options)["runs"][0]
    data, guidance = run["settings"]["data"], run["settings"]["guidance"]
    assert (data["augmentation"], data["target"]["size"], data["guide"]["size"]) == ("crop_flip", 224, 224)
    assert guidance["measure"] == "linear_cka"
    recipe = runpy.run_path(str(RECIPE.path))
    task = SimpleNamespace(labels=tuple(map(str, range(1000))))
    assert recipe["defaults"](recipe["Arguments"](preset="paper"))["per_device_train_batch_size"] == 256
    sizes = {}
    for target in ("deep_fcn", "wide_fcn", "resnet50_without_skips"):
        given = recipe["Arguments"](preset="paper", target=target, dataset="ILSVRC/imagenet-1k")
        assert given.streaming
        values = recipe["defaults"](given)
        assert (values["per_device_train_batch_size"], values["guide_layers"]) == (256, ["Conv2d"])
        with torch.device("meta"):
            network = recipe["target_of"](given, task)
        sizes[target] = sum(p.numel() for p in network.parameters())
        assert network.config.num_labels == 1000
    pixels = 3 * 224 * 224
    assert (
        sizes["deep_fcn"] == pixels * 2048 + 49 * 2048**2 + 1000 * 2049 + 50 * 3 * 2048
    )  # a bias and a batch norm each
    assert sizes["wide_fcn"] == pixels * 8192 + 2 * 8192**2 + 1000 * 8193 + 3 * 3 * 8192
    whole = timm.create_model("resnet50").named_parameters()  # its skip connections have weights where sizes change
    assert sizes["resnet50_without_skips"] == sum(p.numel() for name, p in whole if "downsample" not in name)


def test_a_trained_guide_of_timm_comes_from_the_hub_with_its_normalisation(tmp_path):
    torch.manual_seed(3)
    network = timm.create_model("resnet10t", num_classes=10)
    timm.models.save_for_hf(network, tmp_path / "timm", safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "timm").iterdir()}
    assert {"config.json", "model.safetensors"} <= set(files)
    name = "timm/resnet10t.c3_in1k"
    with Hub(tmp_path / "hub") as hub:
        commit = hub.store.add(f"model/{name}", files)
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        options = {"guide": name, "untrained_guide": [], "guide_image_size": 32, "runs": ["trained_guide"], **ONE_STEP}
        process = launch(tmp_path / "out", env=environment, **options)
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    run = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    guide, seen = run["guide"], run["settings"]["data"]["guide"]
    assert (guide["source"], guide["untrained"], guide["revision"]) == (name, False, commit)
    assert seen["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert len(run["similarity"][0]) - 1 == sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())
    served = load_guide(tmp_path / "timm")
    for key, weight in network.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(served.state_dict()[f"timm_model.{key}"], weight)
    assert guide["fingerprint"] == fingerprint(served)


@resumes_on_several_cpus
def test_two_processes_stream_the_gated_imagenet_of_a_hub_that_drops_connections_and_go_on_after_a_stop(tmp_path):
    calls = []

    def drop(method, path):
        calls.append(path)
        return "cut" if method == "GET" and "/resolve/" in path and "train" in path and len(calls) % 5 == 0 else None

    with Hub(tmp_path / "hub", gated=["dataset/ILSVRC/imagenet-1k"], fault=drop) as hub:
        hub.store.add("dataset/ILSVRC/imagenet-1k", imagenet_files(train=96))

        def stream():
            process = launch(
                tmp_path / "out",
                "--config_file",
                str(CONFIGS / "ddp.yaml"),
                env={**os.environ, **hub.environment(tmp_path / "home")},
                dataset="ILSVRC/imagenet-1k",
                runs=["untrained_guide"],
                image_size=16,
                dataloader_num_workers=1,
                eval_size=8,
                dropout=0.1,
                save_total_limit=2,
            )
            printed, _ = process.communicate(timeout=300)
            assert process.returncode == 0, printed[-3000:]
            saved = (guided / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
            return printed, json.loads((tmp_path / "out" / "results.json").read_text()), saved

        guided = tmp_path / "out" / "seed-0" / "untrained_guide"
        printed, report, saved = stream()
        before = len(calls)
        for name in ("result.json", "model.safetensors", "checkpoint-4"):  # as if stopped in the first of two epochs
            os.rename(guided / name, tmp_path / name)
        _, resumed, saved_again = stream()
    assert printed.count("| untrained guide ") == 1, printed[-3000:]
    assert report["runs"][0]["settings"]["world_size"] == 2
    assert report["runs"][0]["settings"]["data"]["streaming"]
    assert before > 10
    assert (guided / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert resumed["runs"][0]["test"]["loss"] == report["runs"][0]["test"]["loss"]
    assert saved_again == saved  # it went on from there


FEW_RETRIES = """
import runpy, sys
import datasets.config
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_dead_connection_is_an_error_that_says_how_to_go_on_and_leaves_the_checkpoint_whole(tmp_path):
    dead = []

    def die(method, path):
        return 503 if dead and "/resolve/" in path and "train" in path else None

    options = {"dataset": "org/pictures", "streaming": True, "image_size": 16, "runs": ["alone"], "shuffle_buffer": 4}
    options |= {"max_steps": 2000, "eval_steps": 2000, "save_steps": 4, "guide_image_size": 16}
    with Hub(tmp_path / "hub", fault=die) as hub:
        hub.store.add("dataset/org/pictures", imagenet_files(train=96, shards=24))
        command = [sys.executable, "-c", FEW_RETRIES, str(RECIPE.path), *RECIPE.flags(tmp_path / "out", **options)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with on_one_cpu():
            process = subprocess.Popen(command, env={**os.environ, **hub.environment(tmp_path / "home")}, **pipes)
        place = tmp_path / "out" / "seed-0" / "alone"
        deadline = time.monotonic() + 120
        while not list(place.glob("checkpoint-*/trainer_state.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        dead.append(True)
        printed, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "The data could not be read any further (" in printed, printed[-2000:]
    last = last_complete_checkpoint(place)
    assert f"Rerun the same command to resume from {Path(last).name}" in printed
    assert load_guide(last).config.hidden_size == 16


def test_skipped_images_are_counted_and_reported(tmp_path, monkeypatch, capsys):
    rows = imagenet_rows(96)
    rows[7] = truncate(rows[7])
    files = imagenet_files() | {"data/train-00000-of-00001.parquet": parquet(rows)}
    files = {path: content for path, content in files.items() if "of-00004" not in path}
    options = {"dataset": write(tmp_path / "data", files), "image_size": 16, "eval_size": 8, "runs": ["alone"]}
    with pytest.raises(ValueError, match=r"n00000007\.JPEG cannot be decoded"):
        run_here(monkeypatch, tmp_path / "a", max_steps=12, **options)
    run_here(monkeypatch, tmp_path / "b", max_steps=12, on_bad_image="skip", **options)
    assert re.search(r"\n[12] training images could not be decoded and were skipped", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "deep_fnc"}, "--target deep_fnc: possible are deep_fcn, wide_fcn, resnet50_without_skips"),
        ({"runs": ["guided"]}, "--runs guided: possible are alone, alone_shifted, guide_itself"),
        ({"runs": ["distillation"]}, "distillation needs a trained guide: name one with --guide and leave --untrained"),
        ({"runs": ["alone", "trained_guide"]}, "trained_guide needs a trained guide"),
        (
            {"runs": ["untrained_guide_stopped"], "stop_step": 4, "max_steps": 4},
            "--stop_step is 4; untrained_guide_stopped stops guidance within its 4 steps: choose from 1 to 3",
        ),
        ({"runs": ["guide_itself"]}, "trains the guide on the data: add --train_guide"),
        ({"target": "resnet50_without_skips", "dropout": 0.1}, "--dropout applies to the FCNs only"),
        ({"guide_width": 8}, "--guide_width needs --guide resnet18 or resnet34 or resnet50, .*--guide is timm/test_re"),
        ({"guide_width": 8, "guide": []}, r"--guide_width needs --guide resnet18 or .*; --guide is not given"),
        ({"object_size": 9}, "object_size is 9; it must be from 1 to the size of the target's images, 8"),
        ({"augmentation": "shift"}, "shift moves an object on its canvas, so it needs object_size"),
        ({"object_size": 4, "augmentation": "crop_flip"}, "crop_flip takes none"),
        ({"learning_rates": [1e-3], "seeds": [3, 100]}, "both name 100: a seed that chose the learning rate cannot"),
        ({"claim": "deep"}, "--claim deep: possible are convnet_without_skips, convnet_without_skips_cached, wide_fcn"),
        ({"per_device_train_batch_size": 52}, "1197 training images in batches of 52 leave one over"),
        ({"sample_axis": "token"}, "has no positions; sample_axis='token' needs"),
        ({"layer_mapping": "last_99"}, "last_99"),
        ({"eval_strategy": "no"}, "runs are compared by their validation"),
        ({"max_steps": -1}, "--max_steps is -1; it must be at least 1"),
        ({"guide_layers": ["Conv3d"]}, "guide layer 'Conv3d' not found; the guide has"),
        ({"guide": "timm/vit_tiny_patch16_224", "guide_image_size": 30},
         "guide timm/vit_tiny_patch16_224 cannot take images of 30 × 30 pixels .*choose another guide_image_size"),
        ({"guide": "/nowhere/at/all"}, "Cannot load guide '/nowhere/at/all'"),
        ({"target": "resnet50_without_skips", "width": [], "depth": 4}, "depth must be one of 18, 34, 50, got 4"),
        ({"width": 0}, "--width is 0; it must be at least 1"),
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'; possible are raise, skip"),
        ({"stop_step": 0, "runs": ["untrained_guide_stopped"]}, "--stop_step is 0"),
    ],
)  # fmt: skip
def test_bad_flags_are_named_before_any_training(options, words, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=words):
        run_here(monkeypatch, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/**/checkpoint-*"))


@pytest.mark.parametrize("claim", ["convnet_without_skips", "wide_fcn", "deep_fcn"])
def test_a_claim_stands_for_its_flags_and_has_a_rate_a_baseline_of_equal_time_and_differences(
    claim, tmp_path, monkeypatch, capsys
):
    tiny = {"dataset": "digits", "image_size": 16, "guide_width": 4, "train_size": 64, "eval_size": 32, "use_cpu": True}
    tiny |= {"width": 4, "per_device_train_batch_size": 8, "max_steps": 2, "eval_steps": 2, "guide_max_steps": 2}
    tiny |= {"seeds": [0], "search_seeds": [100], "learning_rates": [1e-3, 2e-3]}
    of_claim = {"wide_fcn": {"object_size": 8}, "deep_fcn": {"object_size": 8, "depth": 3}}
    tiny |= of_claim.get(claim, {"depth": 18})
    report = Recipe("fcn_vs_resnet", {"claim": claim}).run_here(monkeypatch, tmp_path / "out", **tiny)
    assert capsys.readouterr().out.startswith(f"--claim {claim}: --dataset zalando-datasets/fashion_mnist --eval_size")
    assert report["claim"] == claim
    shifted = ["alone_shifted"] if claim != "convnet_without_skips" else []
    untrained = ["untrained_guide"] if claim == "deep_fcn" else []
    names = ["alone", *shifted, "guide_itself", *untrained, "trained_guide", "trained_guide_stopped"]
    names.append("alone_equal_time")
    runs = {run["run"]: run for run in report["runs"]}
    assert list(runs) == names
    alone, guided, equal = (runs[name] for name in ("alone", "trained_guide", "alone_equal_time"))
    assert guided["settings"]["guidance"]["measure"] == "ridge_loo"
    assert equal["steps"] >= 1.1 * alone["steps"] * guided["seconds"] / alone["seconds"]
    assert {found["baseline"] for found in report["differences"]} == {"alone", "alone_equal_time"}
    assert f"--claim {claim}" in report["command"]
    assert "--train_guide" not in report["command"]


def test_batch_norm_is_estimated_for_each_evaluation_and_images_may_be_shifted(tmp_path, monkeypatch):
    canvas = {"image_size": 12, "object_size": 8, "target": "wide_fcn", "runs": ["alone", "alone_shifted"]}
    plain = run_here(monkeypatch, tmp_path / "plain", **ONE_STEP, **canvas, depth=[])
    own = run_here(monkeypatch, tmp_path / "own", **ONE_STEP, **canvas, depth=[], batch_norm_rows=32)
    before, after = ({run["run"]: run["test"]["loss"] for run in report["runs"]} for report in (plain, own))
    assert before["alone"] != before["alone_shifted"]
    assert all(before[name] != after[name] for name in before)
    assert (tmp_path / "own" / "seed-0" / "alone" / "predictions.npz").is_file()
    assert (tmp_path / "own" / "errors.png").is_file()
    with pytest.raises(ValueError, match=r"own/seed-0/alone holds a run with other settings: data\.batch_norm_rows"):
        run_here(monkeypatch, tmp_path / "own", **ONE_STEP, **canvas, depth=[], batch_norm_rows=16)


def test_a_stream_without_max_steps_is_refused(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", imagenet_files())
    with pytest.raises(ValueError, match=r"--max_steps is -1; it must be at least 1: .*a stream has no end"):
        run_here(monkeypatch, tmp_path / "recipe", dataset=folder, streaming=True, eval_size=8, max_steps=-1)
    assert not list(tmp_path.glob("recipe/**/checkpoint-*"))


@pytest.fixture
def classifier(tmp_path):
    """The folder of a ResNet for ten classes, and the network."""
    network = ResNetForImageClassification(ResNetConfig(num_labels=10, embedding_size=8, hidden_sizes=[8], depths=[1]))
    network.save_pretrained(tmp_path / "classifier")
    sizes = {"size": {"shortest_edge": 16}, "crop_pct": 1.0}
    ConvNextImageProcessor(**sizes).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier", network


def test_a_classifier_of_ones_own_is_distilled(classifier, tmp_path, monkeypatch):
    options = {"guide": classifier[0], "untrained_guide": [], "runs": ["distillation"]}
    report = run_here(monkeypatch, tmp_path / "out", **options)
    assert [run["run"] for run in report["runs"]] == ["distillation"]
    assert report["runs"][0]["settings"]["data"]["guide"]["size"] == 16  # as its own image processor says


@pytest.mark.parametrize("run", ["distillation", "trained_guide"])
def test_pickled_weights_are_refused_before_any_training(run, classifier, tmp_path, monkeypatch):
    folder, network = classifier
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    options = {"guide": folder, "untrained_guide": [], "runs": ["alone", run]}
    with pytest.raises(ValueError, match=r"Cannot load guide .*model\.safetensors.* pickled ones are refused"):
        run_here(monkeypatch, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/**/checkpoint-*"))
