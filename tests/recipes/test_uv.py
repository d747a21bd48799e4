"""A recipe runs by uv from the checkout alone: its header says what it needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, Recipe

RECIPES = sorted((REPOSITORY / "recipes").glob("*.py"))
HEADER = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", re.MULTILINE)
TINY = {"max_steps": 2, "eval_steps": 2, "eval_size": 16, "per_device_train_batch_size": 8, "use_cpu": True}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_of_a_recipe_names_this_checkout_with_what_recipes_need(path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    (found,) = HEADER.findall(path.read_text(encoding="utf-8"))
    header = tomllib.loads("".join(line[2:] or "\n" for line in found.splitlines(keepends=True)))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert header["requires-python"] == project["requires-python"]
    assert header["dependencies"] == ["hf_guidance[recipes]"]
    assert "recipes" in project["optional-dependencies"]
    source = header["tool"]["uv"]["sources"]["hf_guidance"]
    assert ((path.parent / source["path"]).resolve(), source["editable"]) == (REPOSITORY, True)


@pytest.mark.uv
def test_uv_runs_a_recipe_from_an_empty_folder(tmp_path: Path) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    recipe = Recipe("rnn_vs_transformer", TINY)
    words = [uv, "run", str(recipe.path), *recipe.flags(tmp_path / "out", runs=["alone", "untrained_guide"])]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["run"] for run in runs] == ["alone", "untrained_guide"]
