"""The command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from builders import gpt2

from hf_guidance.commands.main import main


def test_an_error_is_one_line_and_not_a_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["layers", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("hf-guidance layers: error: ")
    assert "nowhere" in said


def test_without_a_command_or_with_another_one_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["paint"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert "hf-guidance" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "compare A B --data D" in capsys.readouterr().out


def test_the_package_is_the_command(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "net")
    words = [sys.executable, "-m", "hf_guidance", "layers", str(tmp_path / "net")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert "GPT2Block" in done.stdout
