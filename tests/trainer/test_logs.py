"""Means of what is logged, over micro-steps and processes."""

from types import SimpleNamespace

import pytest
import torch

from hf_guidance.trainer.logs import RunningMeans, ShortPrinterCallback

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"))


def test_values_are_averaged_by_their_weights_and_counts_are_summed() -> None:
    sums = RunningMeans()
    for value, weight in ((1.0, 1.0), (torch.tensor(4.0), 1.0)):
        sums.add("mean", value, weight)
    sums.add("half", 2.0, 0.5)
    for _ in range(3):
        sums.add("count", 1.0, 0)
    assert sums.drain(ACCELERATOR) == pytest.approx({"mean": 2.5, "half": 4.0, "count": 3.0})
    assert sums.drain(ACCELERATOR) == {}


def test_those_of_a_step_that_is_taken_are_added_to_those_before() -> None:
    before, step = RunningMeans(), RunningMeans()
    before.add("a", 1.0)
    step.add("a", 3.0)
    step.add("b", 5.0)
    before.take(step)
    assert before.drain(ACCELERATOR) == {"a": 2.0, "b": 5.0}


def test_of_what_is_printed_only_guidances_single_pairs_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    logs = {
        "guidance/loss": 1.0,
        "guidance/similarity/a~b": 2.0,
        "eval_guidance/similarity/a~b": 3.0,
        "rewards/f/mean": 4.0,
    }
    state = SimpleNamespace(is_local_process_zero=True)
    ShortPrinterCallback().on_log(None, state, None, logs=logs)
    printed = capsys.readouterr().out
    assert "guidance/loss" in printed
    assert "rewards/f/mean" in printed
    assert "similarity" not in printed
