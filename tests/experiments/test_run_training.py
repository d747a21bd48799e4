"""One run trained to its record, or read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import gpt2, llama, token_rows
from trainers import make_trainer

from hf_guidance.experiments.run import SETTINGS, Run
from hf_guidance.experiments.run_training import NEEDED, RESULT, recorded, result_of, train_and_record
from hf_guidance.guide.identity import identity
from hf_guidance.trainer.steps import TrainingClock

ALONE = Run("alone", 7, gpt2)


def test_a_run_is_trained_evaluated_saved_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "seed-7" / "alone"
    trainer = make_trainer(place, gpt2(), eval_dataset=token_rows(4), callbacks=[TrainingClock()])
    found = train_and_record(ALONE, trainer, place, {"a": 1}, "loss", lambda trainer: {"test_loss": 2.0})
    assert "seed-7/alone: 3 steps" in capsys.readouterr().out
    assert (found["steps"], found["test"]) == (3, {"loss": 2.0})
    assert found["validation"] == next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert json.loads((place / RESULT).read_text()) == json.loads(json.dumps(found))
    assert json.loads((place / SETTINGS).read_text()) == {"a": 1}
    assert (place / "model.safetensors").is_file()
    assert result_of(ALONE, place, {"a": 1}) == json.loads((place / RESULT).read_text())
    with pytest.raises(ValueError, match="a was 1, is 2"):
        result_of(ALONE, place, {"a": 2})


def test_a_run_that_is_not_finished_or_had_another_guide_is_not_read(tmp_path: Path) -> None:
    assert result_of(ALONE, tmp_path, {}) is None
    (tmp_path / RESULT).write_text(json.dumps(dict.fromkeys(NEEDED) | {"guide": identity(llama(1))}))
    assert result_of(Run("guided", 7, gpt2, guide=llama), tmp_path, {}) is not None
    with pytest.raises(ValueError, match="guide"):
        result_of(Run("guided", 7, gpt2, guide=lambda: llama(2)), tmp_path, {})


def test_a_record_that_lacks_fields_is_named_with_what_to_do(tmp_path: Path) -> None:
    assert recorded(tmp_path) is None
    (tmp_path / RESULT).write_text(json.dumps({name: 0 for name in NEEDED if name not in ("test", "curve")}))
    said = rf"^{tmp_path / RESULT} lacks test, curve, .*: delete it to train that run again, or choose another output_d"
    with pytest.raises(ValueError, match=said):
        result_of(ALONE, tmp_path, {})
