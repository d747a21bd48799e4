"""Errors worded for users are told in one line and once; errors of the code keep their traceback."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY

from hf_guidance import GuidanceConfig
from hf_guidance.experiments import user_errors
from hf_guidance.experiments.user_errors import is_for_the_user, tell_in_one_line
from hf_guidance.loss import GuidanceLoss


def error_of(call):
    try:
        call()
    except Exception as error:
        return error
    return None


def test_only_what_this_package_raises_itself_is_worded_for_the_user():
    assert is_for_the_user(error_of(lambda: GuidanceConfig(sketch=1)))
    assert not is_for_the_user(error_of(lambda: GuidanceConfig.from_dict(3)))  # `set(3)`, inside the package
    assert not is_for_the_user(error_of(lambda: torch.zeros(2) + torch.zeros(3)))
    assert not is_for_the_user(error_of(lambda: GuidanceLoss(1, 2, 3, 4)))
    assert not is_for_the_user(ValueError("never raised"))


def test_one_line_is_printed_and_bugs_are_handed_on(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *given: seen.append(given))
    monkeypatch.setattr(sys, "argv", ["/some/recipe.py"])
    tell_in_one_line()
    for error in (error_of(lambda: GuidanceConfig(sketch=1)), bug := ZeroDivisionError("bug")):
        sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == "recipe.py: error: sketch is 1; it must be at least 2.\n"
    assert seen == [(ZeroDivisionError, bug, None)]


def test_another_process_than_the_first_waits_to_be_ended(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(user_errors.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("RANK", "1")
    tell_in_one_line()
    error = error_of(lambda: GuidanceConfig(sketch=1))
    sys.excepthook(type(error), error, error.__traceback__)
    assert waited == [user_errors.WAIT]
    assert "sketch is 1" in capsys.readouterr().err


ONE_LINE = "{}.py: error: sketch is 1; it must be at least 2.\n"


def test_a_recipe_ends_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "recipes" / "rnn_vs_transformer.py"), "--use_cpu", "--sketch", "1"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert done.stderr == ONE_LINE.format("rnn_vs_transformer")


@pytest.mark.parametrize("recipe", ["fcn_vs_resnet", "guidance_cost", "which_prior"])
def test_so_does_every_other_one(recipe: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    path = str(REPOSITORY / "recipes" / f"{recipe}.py")
    monkeypatch.setattr(sys, "argv", [path, "--use_cpu", "--sketch", "1", "--output_dir", str(tmp_path)])
    error = error_of(lambda: runpy.run_path(path, run_name="__main__"))
    sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter does
    assert capsys.readouterr().err.endswith(ONE_LINE.format(recipe))


def test_two_processes_tell_it_once(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(REPOSITORY / "recipes" / "rnn_vs_transformer.py"), "--use_cpu", "--sketch", "1"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: sketch is 1; it must be at least 2.") == 1
