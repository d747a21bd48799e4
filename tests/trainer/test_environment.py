"""How a process says that it was started."""

import subprocess
import sys

import pytest
from launching import CONFIGS

SAYS = """
from accelerate import PartialState
from hf_guidance.trainer.environment import command_line
PartialState(cpu=True)
print(f'SAID {command_line()}\\n', end='', flush=True)  # in one piece, as two processes may print at once
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
