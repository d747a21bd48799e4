"""Annotations say something, reach a user's type checker, and stand in what an editor shows."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from scripts.anys import parameters

import hf_guidance

REPOSITORY = Path(__file__).parents[1]
AT_MOST = 217  # parameters that say nothing; lower it whenever there are fewer


def test_no_more_public_parameters_say_nothing() -> None:
    found = parameters()
    empty = [one for one in found if one.says_nothing]
    assert len(found) > 500, "the count has lost sight of the package"
    assert len(empty) <= AT_MOST, "\n".join(f"{one.place}  {one.name}: {one.annotation}" for one in empty)


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
