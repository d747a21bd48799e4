"""Imports point one way, from room to room and file to file; what only a recipe needs is not imported with the rest."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_guidance

PACKAGE = Path(hf_guidance.__file__).parent

# From the ground up: a room, or a flat file, imports from its own and from those before it. `targets` and `tasks` stand
# beside them: anybody may import from these, and they import nothing of the core.
ROOMS = (
    "mapping",
    "schedule",
    "similarity",
    "config",
    "features",
    "guide",
    "card",
    "loss",
    "analysis",
    "trainer",
    "experiments",
    "commands",
)
BESIDE = {"targets", "tasks"}
OPTIONAL = ("datasets", "evaluate", "matplotlib", "sklearn")
OF_HUGGING_FACE = {"transformers", "accelerate", "huggingface_hub", "timm", "datasets", "evaluate"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it, as paths within the package."""
    inside = path.relative_to(PACKAGE.parent).parent.parts  # the package a relative import starts from
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            files = {f"{whole}.{alias.name}" for alias in node.names}
            files = {name for name in files if name.removeprefix("hf_guidance.") in MODULES}
            names = files if len(files) == len(node.names) else {whole, *files}
        else:
            continue
        found |= {name.removeprefix("hf_guidance.") for name in names if name.startswith("hf_guidance.")}
    return found & set(MODULES)


def room(name: str) -> str:
    return name.split(".")[0]


def test_the_rooms_are_those_on_disk() -> None:
    there = {room(name) for name in MODULES}
    assert sorted((*ROOMS, *BESIDE)) == sorted(there - {"__init__", "__main__"})


def test_the_imports_of_a_file_are_found() -> None:
    assert {"loss", "guide.sharding", "config"} <= imported(MODULES["trainer.guidance_mixin"])
    assert imported(MODULES["targets.modeling_plain_rnn"]) == {"targets.configuration_plain_rnn"}
    assert "targets" in imported(MODULES["guide.loading"])  # inside a function


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ROOMS])
def test_imports_point_one_way(name: str) -> None:
    above = ROOMS[ROOMS.index(room(name)) + 1 :]
    assert not {other for other in imported(MODULES[name]) if room(other) in above}


def test_no_files_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).prepare()  # else it raises


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in BESIDE])
def test_targets_and_tasks_import_nothing_of_the_core(name: str) -> None:
    assert {room(other) for other in imported(MODULES[name])} <= {room(name)}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ("mapping", "schedule", "similarity")])
def test_the_mathematics_knows_nothing_of_hugging_face(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {room(name) for name in names} & OF_HUGGING_FACE


WITHOUT_EXTRAS = f"""
import json, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # as if it were not installed
import torch
import hf_guidance.tasks
from hf_guidance import GuidanceConfig, GuidanceTrainer, load_guide
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
folder = sys.argv[1]
guide = load_guide(folder, untrained=True)  # one of our own architectures, which nothing has imported yet
sizes = dict(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
rows = [dict(input_ids=torch.arange(5) + i, labels=torch.arange(5) + i) for i in range(8)]
args = TrainingArguments(folder, max_steps=1, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
                         logging_steps=1, save_strategy="no")
trainer = GuidanceTrainer(LlamaForCausalLM(LlamaConfig(**sizes)), args, train_dataset=rows, guide=guide)
trainer.train()
print("RESULT", json.dumps(dict(guide=type(guide).__name__, log=trainer.state.log_history[0])))
"""


def test_without_what_only_recipes_need_one_can_still_train(tmp_path: Path) -> None:
    from hf_guidance.targets import RNNConfig

    RNNConfig(vocab_size=17, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert "RESULT" in done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.split("RESULT")[1])
    assert result["guide"] == "RNNModel"
    assert 0 < result["log"]["guidance/loss"] < 2


# what four modules of the flat package had, before they became rooms
EARLIER = {
    "similarity": [
        "MEASURES",
        "Measure",
        "ALL_INVARIANCES",
        "TINY",
        "debiased_cka",
        "get_measure",
        "linear_cka",
        "procrustes",
        "rbf_cka",
        "ridge",
        "rsa",
    ],
    "features": [
        "HIDDEN",
        "AllRead",
        "LayerReader",
        "base_model_of",
        "describe_modules",
        "find_modules",
        "first_tensor",
    ],
    "guide": ["load_guide", "untrained_network"],
    "trainer": ["GUIDE_FOLDER", "GuidanceMixin", "GuidanceTrainer"],
}


@pytest.mark.parametrize("name", EARLIER)
def test_what_was_imported_from_a_module_is_imported_from_its_room(name: str) -> None:
    module = importlib.import_module(f"hf_guidance.{name}")
    assert [entry for entry in EARLIER[name] if not hasattr(module, entry)] == []
    assert set(EARLIER[name]) <= set(module.__all__)


# their modules need packages that their room must do without
NOT_HANDED_ON = {"image_decoding", "image_rows", "image_splits", "images", "pixel_formats", "splits", "metrics"}


def used_elsewhere(folder: str) -> set[str]:
    """Return the names that other rooms import from the files of a room."""
    found = set()
    for path in (path for name, path in MODULES.items() if room(name) != folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"hf_guidance.{folder}."):
                file = str(node.module).split(".")[-1]
                found |= set() if file in NOT_HANDED_ON else {alias.name for alias in node.names}
    return found


FOLDERS = [name for name in (*ROOMS, *sorted(BESIDE)) if (PACKAGE / name).is_dir()]


def test_the_tests_mirror_the_rooms() -> None:
    tests = PACKAGE.parent / "tests"
    assert [name for name in FOLDERS if not any((tests / name).glob("test_*.py"))] == []
    assert [name for name in ROOMS if name not in FOLDERS and not (tests / f"test_{name}.py").is_file()] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_every_room_says_what_lives_there(name: str) -> None:
    words = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    assert words


@pytest.mark.parametrize("name", sorted({*FOLDERS} - {"commands"}))
def test_a_room_hands_on_what_other_rooms_use(name: str) -> None:
    """A function that is called as its module is, such as `guide.forward`, would hide the module."""
    handed_on = set(importlib.import_module(f"hf_guidance.{name}").__all__)
    files = {path.stem for path in (PACKAGE / name).iterdir()}
    assert used_elsewhere(name) - handed_on - files == set()
