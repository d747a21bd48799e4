"""The parts of a task: every builder's fill a Trainer, and the logits are found among a model's outputs."""

import dataclasses

import pytest
import torch

from hf_guidance.tasks import TASKS, build_task
from hf_guidance.tasks.base import IGNORED_LABEL, Task, argmax_predictions, main_logits

OPTIONS = {
    "copy_paste": {"train_size": 20, "eval_size": 4, "test_size": 4},
    "parity": {"train_size": 20, "eval_size": 4, "test_size": 4},
    "language_modeling": {"vocab_size": 260, "block_size": 4},
    "image_classification": {},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_what_a_trainer_needs(name, tmp_path):
    options = dict(OPTIONS[name])
    if name == "language_modeling":
        (tmp_path / "text.txt").write_text("some words\n" * 100)
        options["text_files"] = [str(tmp_path / "text.txt")]
    task = build_task(name, **options)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.description.endswith(".")
    rows = [task.train_dataset[0], task.eval_dataset[0], task.test_dataset[0]]
    for row in rows:
        assert "labels" in task.data_collator([row])
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.metric = "another"


def test_the_logits_are_the_first_of_several_outputs():
    logits = torch.randn(2, 3)
    assert main_logits(logits) is logits
    assert main_logits((logits, torch.zeros(5))) is logits


def test_the_best_class_of_each_position():
    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
    assert argmax_predictions((logits, None), None).tolist() == [[1, 0]]


def test_the_ignored_label_is_the_one_that_torchs_cross_entropy_ignores():
    logits = torch.randn(3, 4)
    half = torch.nn.functional.cross_entropy(logits, torch.tensor([1, IGNORED_LABEL, IGNORED_LABEL]))
    torch.testing.assert_close(half, torch.nn.functional.cross_entropy(logits[:1], torch.tensor([1])))
