"""What a run's record keeps of its time."""

from __future__ import annotations

from pathlib import Path

from builders import gpt2, token_rows
from trainers import make_trainer

from hf_guidance.record import TrainingClock


def test_the_time_of_a_run_that_was_stopped_is_that_of_all_its_parts(tmp_path: Path) -> None:
    def part(checkpoint: str | None = None) -> TrainingClock:
        clock = TrainingClock()
        settings = {
            "save_steps": 2,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "max_steps": 4,
        }
        trainer = make_trainer(tmp_path, gpt2(), eval_dataset=token_rows(), callbacks=[clock], **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return clock

    first = part()
    second = part(str(tmp_path / "checkpoint-2"))
    assert [step for step, _ in second.marks] == [2, 4]
    assert second.marks[0] == first.marks[0]
    assert second.marks[0][1] < second.marks[1][1] == second.seconds
