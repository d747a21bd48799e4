"""The command of a run, as its process tells it, and the CPUs that it may use."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from launching import CONFIGS

import hf_guidance
from hf_guidance.trainer import environment

# the module alone, as the package takes seconds to import
SAYS = f"""
import importlib.util
from accelerate import PartialState
spec = importlib.util.spec_from_file_location("environment", {environment.__file__!r})
environment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environment)
PartialState(cpu=True)
print(f'SAID {{environment.command_line()}}\\n', end='', flush=True)  # in one piece, as two processes may print at once
"""


@pytest.fixture
def started(tmp_path):
    (tmp_path / "app").mkdir()
    for name in ("train.py", "app/__main__.py", "app/part.py", "app/__init__.py"):
        (tmp_path / name).write_text(SAYS if "init" not in name else "")

    def start(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
        )
        return [line.removeprefix("SAID ") for line in done.stdout.splitlines() if line.startswith("SAID ")]

    return start


@pytest.mark.parametrize("words", [["train.py", "--lr", "1"], ["app", "x"], ["-m", "app", "x"], ["-m", "app.part"]])
def test_a_script_a_folder_and_a_module(started, words):
    assert started(*words) == [str(["python", *words])]


def test_what_is_no_program_says_nothing(started):
    assert started("-c", SAYS, "x") == ["None"]


def test_several_processes_say_how_they_were_launched(started):
    words = ["--config_file", str(CONFIGS / "cpu.yaml"), "--main_process_port", "0", "train.py", "--lr", "1"]
    assert started("-m", "accelerate.commands.launch", *words) == 2 * [str(["accelerate", "launch", *words])]


def test_the_cpus_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert environment.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert environment.usable_cpus() == os.cpu_count()


def test_versions_and_hardware_of_this_run(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    found = environment.environment()
    assert (found["torch"], found["transformers"]) == (torch.__version__, transformers.__version__)
    assert found["hf_guidance"] == hf_guidance.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["processes"], found["threads"]) == (1, 7)
    assert found["device"].split(": ")[0] in ("cpu", "cuda", "mps")
