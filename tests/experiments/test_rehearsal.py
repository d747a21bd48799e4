"""The rehearsal of matched runs: what cannot be compared is told before one of them is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import gpt2, llama, token_rows
from torch import Tensor, nn
from trainers import make_trainer

from hf_guidance.experiments.controls import MatchedRun
from hf_guidance.experiments.files import write_json
from hf_guidance.experiments.rehearsal import check_rows, checked_seeds, rehearse
from hf_guidance.experiments.run_training import RESULT

DATA = {"eval_dataset": token_rows(4), "sample_axis": "token"}
Make = Callable[[MatchedRun], Any]


def runs(folder: Path) -> list[MatchedRun]:
    return [
        MatchedRun("alone", 0, False, str(folder)),
        MatchedRun("noise_guide", 0, True, str(folder), control="noise_guide"),
        MatchedRun("alone_equal_time", 0, False, str(folder), max_steps=9),
    ]


def maker(folder: Path, **of_guided: Any) -> Make:
    def make(run: MatchedRun) -> Any:
        changes = {"target": gpt2(), "guide": llama(), "guide_input": "noise", **of_guided} if run.guided else {}
        given: dict[str, Any] = {"seed": 0, "max_steps": run.max_steps or 3, **DATA, "target": gpt2(), **changes}
        given.pop("sample_axis" if not run.guided else "", None)
        return make_trainer(folder, given.pop("target"), **given)

    return make


def test_runs_that_match_are_made_once_and_none_where_all_are_finished(tmp_path: Path) -> None:
    seen: list[MatchedRun] = []
    make = maker(tmp_path)
    rehearse(lambda run: [make(run), seen.append(run)][0], runs(tmp_path))
    assert seen == runs(tmp_path)
    write_json(tmp_path / RESULT, {})
    rehearse(lambda run: pytest.fail("made"), runs(tmp_path))


def test_a_metric_that_an_evaluation_does_not_give_is_found_out_before_training(tmp_path: Path) -> None:
    make = maker(tmp_path)

    def measuring(run: MatchedRun) -> Any:
        trainer = make(run)
        trainer.compute_metrics = lambda _: {"accuracy": 0.5}
        return trainer

    with pytest.raises(ValueError, match="metric is 'accuracy', but the evaluation gives loss: name one of these"):
        rehearse(make, runs(tmp_path), "accuracy")
    with pytest.raises(ValueError, match="metric is 'f1', but the evaluation gives loss, accuracy"):
        rehearse(measuring, runs(tmp_path), "f1")
    rehearse(measuring, runs(tmp_path), "accuracy")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": gpt2(1)}, "other initial weights, so that more than guidance would differ: draw the target's"),
        ({"max_steps": 4}, r"other max_steps \(3 and 4\).* give both the same"),
        ({"train_dataset": token_rows(9)}, r"other rows of train_dataset \(\d+ and 9\)"),
        ({"eval_dataset": {"a": token_rows(4), "b": token_rows(4)}}, r"eval_dataset holds several datasets \(a, b\)"),
        ({"eval_dataset": []}, "eval_dataset has no rows"),
    ],
)
def test_runs_that_differ_in_more_than_guidance_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rehearse(maker(tmp_path, **changes), runs(tmp_path))


def test_noise_for_inputs_that_it_cannot_replace_is_refused(tmp_path: Path) -> None:
    class Sounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 8)

        def forward(self, input_values: Tensor, labels: Tensor | None = None) -> Any:
            found = self.layer(input_values)
            return (found,) if labels is None else (found.square().mean(), found)

    rows = [{"input_values": torch.randn(6), "labels": torch.tensor(0)} for _ in range(8)]

    def make(run: MatchedRun) -> Any:
        data: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows}
        layers = {"target_layers": ["layer"], "guide_layers": ["layer"], "guide_input": "noise"} if run.guided else {}
        return make_trainer(tmp_path, Sounds(), Sounds() if run.guided else None, seed=0, **data, **layers)

    with pytest.raises(ValueError, match=r"noise replaces one of input_ids.* the batch has \['input_values'"):
        rehearse(make, runs(tmp_path)[:2])


def test_seeds_are_whole_numbers_each_once() -> None:
    assert checked_seeds(range(3)) == [0, 1, 2]
    assert [type(seed) for seed in checked_seeds(list(np.arange(2)))] == [int, int]
    for wrong in (3, "ab", [0.5], [-1], [1, 1], []):
        with pytest.raises(ValueError, match="expected a list of whole numbers from 0 on, each once"):
            checked_seeds(wrong)  # type: ignore[arg-type]


def test_rows_are_of_one_dataset() -> None:
    check_rows(token_rows(2), "test_dataset")
    check_rows(iter(token_rows(2)), "test_dataset")
    with pytest.raises(ValueError, match=r"test_dataset holds several datasets \(a\)"):
        check_rows({"a": token_rows(2)}, "test_dataset")
