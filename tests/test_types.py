"""Annotations say something, reach a user's type checker, and stand in what an editor shows."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from scripts.anys import parameters
from transformers import Seq2SeqTrainer, Trainer

import hf_guidance

REPOSITORY = Path(__file__).parents[1]
AT_MOST = 0.03  # share of the public parameters that may say nothing


def test_no_more_public_parameters_say_nothing() -> None:
    found = parameters()
    empty = [one for one in found if one.says_nothing]
    assert len(found) > 500, "the count has lost sight of the package"
    assert len(empty) <= AT_MOST * len(found), "\n".join(f"{one.place}  {one.name}: {one.annotation}" for one in empty)


COUNTED = """
from typing import Any
Facts = dict[str, Any]
Many = list[Facts]
Number = int
def one(a, b: Any, c: object, d: Many, e: Facts | None, f: Number, *args: Any, **kwargs: Any): ...
def _own(a): ...
class Thing:
    def __init__(self, a: int, b): ...
    def __call__(self, a): ...
    @classmethod
    def make(cls, a: dict[str, int]): ...
class _Own:
    def method(self, a): ...
class Short(TrainerCallback):
    def on_log(self, args, state: int, *_: Any, **kwargs: Any): ...
"""


def test_what_says_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "file.py").write_text(COUNTED)
    (tmp_path / "_own.py").write_text("def function(a): ...")
    found = parameters(tmp_path)
    assert [one.name for one in found if one.says_nothing] == [*"abcde", "*args", "**kwargs", "b", "args"]
    assert [one.name for one in found if not one.says_nothing] == ["f", "a", "a", "state"]
    assert {one.room for one in found} == {"room"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


def test_wheel_and_sdist_say_that_the_package_is_typed(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert "hf_guidance/py.typed" in zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hf_guidance/py.typed", "CITATION.cff"} <= there


def test_the_citation_is_complete_and_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == hf_guidance.__version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    bibtex = " ".join(readme.partition("```bibtex")[2].partition("```")[0].split())
    assert paper["title"] in bibtex
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"{{{names}}}" in bibtex
    assert f"{{{paper['year']}}}" in bibtex
    assert paper["collection-title"] in bibtex
    assert paper["url"] in readme


def names_of(shown: object) -> list[str]:
    return [name for name in inspect.signature(shown).parameters if name != "self"]


def test_the_trainers_arguments_are_those_of_transformers_and_the_guidance() -> None:
    own, theirs = (inspect.signature(cls.__init__).parameters for cls in (hf_guidance.GuidanceTrainer, Trainer))
    assert list(own) == [*theirs, "guide", "guidance"]
    assert all(own[name].default == theirs[name].default and own[name].kind == theirs[name].kind for name in theirs)
    assert names_of(hf_guidance.GuidanceTrainer) == list(own)[1:]  # what help() shows


def test_a_trainer_behind_the_mixin_shows_its_own_arguments() -> None:
    class Guided(hf_guidance.GuidanceMixin, Seq2SeqTrainer):
        """Has no `__init__`."""

    class Special(Guided):
        def __init__(self, number: int, **kwargs: object) -> None:
            super().__init__(**kwargs)

    class Behind(Trainer):
        def __init__(self, model: object, **kwargs: object) -> None:
            super().__init__(model, **kwargs)

    class InFront(hf_guidance.GuidanceMixin, Behind):
        """Passes on what it does not know."""

    assert names_of(Guided) == [*names_of(Seq2SeqTrainer), "guide", "guidance"]
    assert names_of(Special) == ["number", "kwargs"]
    assert names_of(InFront) == ["model", "guide", "guidance", "kwargs"]


USERS = """
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments
from hf_guidance import GuidanceConfig, GuidanceLoss, GuidanceMixin, GuidanceTrainer, linear_cka, load_guide

guide = load_guide("gpt2", untrained=True, seed=0, dtype=torch.float32)
config = GuidanceConfig(measure="debiased_cka", guidance_weight=0.5)
model: nn.Module = nn.Linear(2, 2)
trainer = GuidanceTrainer(model, TrainingArguments("out"), guide=guide, guidance=config)
trainer.train()
trainer.push_to_hub()
step: int = trainer.state.global_step
loss = GuidanceLoss(model, guide, config)
with loss.watch({"input_ids": torch.zeros(8, 4)}, step=step) as watched:
    total: Tensor = watched.total(torch.zeros(()))
similarity: Tensor = linear_cka(torch.randn(8, 4), torch.randn(8, 5))
"""
MISTAKEN = (
    USERS
    + """
GuidanceTrainer(model, guide="gpt2")
GuidanceTrainer(model, guidanc=config)
linear_cka([1.0], [2.0])
"""
)


@pytest.mark.slow
def test_a_users_script_is_checked_against_the_wheel(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target"]
    subprocess.run([*install, str(tmp_path / "installed"), str(wheel)], check=True, capture_output=True)
    (tmp_path / "script.py").write_text(USERS)
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py", "mistaken.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in checked.stdout.splitlines() if "error:" in line]
    assert len(errors) == 4, checked.stdout + checked.stderr
    assert all(line.startswith("mistaken.py:") for line in errors), checked.stdout
