"""Displays of logs: the progress bar, the printed lines, a notebook's table, and what trackers show of them."""

import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import gpt2, llama, token_rows
from trainers import make_trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from hf_guidance.trainer.logs import ShortPrinterCallback, ShortProgressCallback, short_form_of


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


def test_only_trainers_own_callbacks_of_progress_have_a_short_form() -> None:
    for full, short in ((ProgressCallback, ShortProgressCallback), (PrinterCallback, ShortPrinterCallback)):
        assert type(short_form_of(full())) is short
    assert short_form_of(ShortPrinterCallback()) is None
    assert short_form_of(TrainerCallback()) is None


@pytest.mark.trainers
@pytest.mark.parametrize("evaluates", [True, False])
def test_a_notebooks_table_has_the_losses_of_the_task(tmp_path: Path, evaluates: bool) -> None:
    pytest.importorskip("IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    class Keep(TrainerCallback):
        def on_step_end(self, *_: object, **kwargs: object) -> None:
            tables.append(shown.training_tracker.inner_table)

    tables: list[list[list[float]]] = []
    how = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": token_rows(8), "eval_similarity": True}
    callbacks = [NotebookProgressCallback(), Keep()]
    trainer = make_trainer(tmp_path, gpt2(), llama(), callbacks=callbacks, **(how if evaluates else {}))
    (shown,) = (cb for cb in trainer.callback_handler.callbacks if isinstance(cb, NotebookProgressCallback))
    assert type(shown) is not NotebookProgressCallback
    trainer.train()
    logs = [log for log in trainer.state.log_history if "task/loss" in log]
    assert all(log["loss"] > log["task/loss"] for log in logs)
    head, *lines = tables[-1]
    assert head == (["Step", "Training Loss", "Validation Loss"] if evaluates else ["Step", "Training Loss"])
    assert [line[1] for line in lines] == [log["task/loss"] for log in logs]
    if evaluates:
        assert [line[2] for line in lines] == [
            log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
        ]


GROUPS = {"train/guidance/loss", "train/guidance/similarity", "train/guidance/weight", "train/task/loss"}
PAIRS = {"train/guidance/similarity/hidden_states.1~hidden_states.1", "eval/guidance/similarity"}


def tracked(folder: Path, tracker: str) -> list[dict[str, float]]:
    """Train with a tracker, and return the logs."""
    how = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": token_rows(8), "eval_similarity": True}
    trainer = make_trainer(folder, gpt2(), llama(), **how, report_to=tracker, project="guided")
    trainer.train()
    return [log for log in trainer.state.log_history if "task/loss" in log]


@pytest.mark.trainers
def test_tensorboard_shows_guidance_and_task_as_groups(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tracked(tmp_path, "tensorboard")
    (place,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(place)).Reload()
    assert set(events.Tags()["scalars"]) >= GROUPS | PAIRS
    for name in ("guidance/similarity", "task/loss"):
        shown = events.Scalars(f"train/{name}")
        assert [event.step for event in shown] == [1, 2, 3]
        assert [event.value for event in shown] == pytest.approx([log[name] for log in logs], rel=1e-6)


@pytest.mark.trainers
def test_trackio_shows_guidance_and_task_as_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    logs = tracked(tmp_path, "trackio")
    (store,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(store) as base:
        rows = [json.loads(text) for (text,) in base.execute("select metrics from metrics order by id")]
    assert set().union(*rows) >= GROUPS | PAIRS
    assert [row["train/task/loss"] for row in rows if "train/task/loss" in row] == [log["task/loss"] for log in logs]
