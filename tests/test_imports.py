"""Imports point down only, and what only a recipe needs is not imported with the package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_guidance

PACKAGE = Path(hf_guidance.__file__).parent

# from the ground up; a module may import from its own layer and from those below
LAYERS: list[set[str]] = [
    {"runtime", "sharding", "kernels", "similarity", "mapping", "schedule", "config", "sketch", "ranks", "pairwise"}
    | {"thin", "together", "cpu_kernels", "gpu_kernels", "clock", "scrub", "history", "markdown", "guide_configs"}
    | {"guide_source", "guide_size"}
    | {"frozen", "batches", "matrices"},
    {"identity", "command", "scrub_settings"},
    {"watched", "samples", "features", "guide", "guide_input", "flags", "layer_drop", "layer_stacks"},
    {"pushed", "cache"},
    {"guide_running"},
    {"loss", "logs", "card_facts", "data_facts", "card_guidance", "card_results", "model_card"},
    {"analysis", "accumulation"},
    {"staging", "uploads", "layer_maps", "card_writing", "publishing", "preparation", "resuming", "failure", "checks"}
    | {"guided_steps"},
    {"trainer", "distillation"},
    {"cost", "comparison", "run_settings", "record", "record_facts", "recipe_cards"},
    {"recipe"},
    {"__init__"},
]
BESIDE = {"targets", "tasks"}  # imported from anywhere, importing nothing of the core
OPTIONAL = ("datasets", "evaluate", "matplotlib", "sklearn")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it, as paths within the package."""
    inside = path.relative_to(PACKAGE.parent).parent.parts  # the package a relative import starts from
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            names = [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("hf_guidance.") for name in names if name.startswith("hf_guidance.")}
    return found & set(MODULES)


def top(name: str) -> str:
    return name.split(".")[0]


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if top(name) in layer)


def test_every_module_has_its_place() -> None:
    known = set.union(BESIDE, *LAYERS)
    assert {top(name) for name in MODULES} <= known, "give the new module a layer"


def test_the_imports_of_a_file_are_found() -> None:
    assert {"loss", "sharding", "config"} <= imported(MODULES["trainer"])
    assert imported(MODULES["targets.modeling_plain_rnn"]) == {"targets.configuration_plain_rnn"}
    assert "targets" in imported(MODULES["guide"])  # inside a function


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) not in BESIDE])
def test_imports_point_down_only(name: str) -> None:
    above = {other for other in imported(MODULES[name]) if top(other) not in BESIDE and level(other) > level(name)}
    assert not above


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) in BESIDE])
def test_targets_and_tasks_import_nothing_of_the_core(name: str) -> None:
    assert {top(other) for other in imported(MODULES[name])} <= {top(name)}


@pytest.mark.parametrize("name", ["cpu_kernels", "kernels", "matrices", "similarity", "pairwise", "thin", "sketch"])
def test_the_mathematics_knows_nothing_of_hugging_face(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {top(name) for name in names} & {"transformers", "accelerate", "huggingface_hub", "timm"}


WITHOUT_EXTRAS = f"""
import json, sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # as if it were not installed
import torch
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
    assert 0 < result["log"]["guidance/loss"] < 1
