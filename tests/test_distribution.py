"""The content of what `make dist` builds, and README's first example run from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_readme import BLOCKS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_guidance"
OFFLINE = """
import socket

def refuse(self, address):
    raise OSError(f"a connection to {address}")

socket.socket.connect = refuse
"""
INSTALLED = """
import hf_guidance
assert "site-packages" in hf_guidance.__file__, hf_guidance.__file__
print("RESULT", trainer.state.global_step)
"""
pytestmark = pytest.mark.dist


def built(pattern: str) -> Path:
    found = list((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"dist/ holds {len(found)} {pattern}: run `make dist`"
    return found[0]


def files_of_the_package() -> set[str]:
    there = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in there}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_beside_it() -> None:
    with zipfile.ZipFile(built("*.whl")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_of_the_package()
    assert "hf_guidance/py.typed" in names
    assert [name for name in names if name.endswith(".jinja")]


def test_the_sdist_holds_package_tests_recipes_and_licence() -> None:
    with tarfile.open(built("*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert files_of_the_package() <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "tests/conftest.py", "recipes/rnn_vs_transformer.py"} <= names


def test_readmes_first_example_runs_from_the_installed_wheel_without_a_network(tmp_path: Path) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    python, work = tmp_path / "environment" / "bin" / "python", tmp_path / "empty"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for words in (
        ["venv", "--python", sys.executable, str(tmp_path / "environment")],
        ["pip", "install", "--python", str(python), str(built("*.whl"))],
    ):
        subprocess.run([uv, *words], env=environment, check=True)
    work.mkdir()
    (work / "train.py").write_text("\n".join([OFFLINE, BLOCKS[0], INSTALLED]))
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = [str(python), "train.py"]
    done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert "RESULT 60" in done.stdout, done.stderr[-3000:]
