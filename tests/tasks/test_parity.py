"""Parity: labels against a plain loop, splits, lengths, the curriculum's helper, and a batch."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_guidance.tasks import limit_length, parity

SIZES = {"train_size": 3000, "eval_size": 300, "test_size": 300}


@pytest.fixture(scope="module")
def task():
    return parity(max_length=12, **SIZES)


def splits(task):
    return task.train_dataset, task.eval_dataset, task.test_dataset


def test_labels_are_the_parity_of_the_ones_and_balanced_in_every_split(task):
    for split in splits(task):
        for row in split:
            odd = 0
            for bit in row["input_ids"]:
                odd ^= bit
            assert row["labels"] == odd
        assert np.mean(split["labels"]) == pytest.approx(0.5, abs=0.06)


def test_no_string_is_in_two_splits(task):
    train, held_out, test = ({tuple(bits) for bits in split["input_ids"]} for split in splits(task))
    assert not train & held_out
    assert not train & test
    assert not held_out & test


def test_lengths_are_uniform_over_those_of_which_the_split_has_strings():
    task = parity(**{**SIZES, "eval_size": 3000})
    for split in (task.train_dataset, task.eval_dataset):
        lengths = np.bincount([len(bits) for bits in split["input_ids"]])
        assert len(lengths) == 51
        assert not lengths[:2].any()
        possible = lengths[lengths > 0] / lengths.sum()
        assert len(possible) >= 45
        np.testing.assert_allclose(possible, 1 / len(possible), atol=0.01)


def test_the_same_seed_makes_the_same_rows(task):
    assert parity(max_length=12, **SIZES).train_dataset[:] == task.train_dataset[:]
    assert parity(max_length=12, **SIZES, seed=1).train_dataset[:] != task.train_dataset[:]


def test_limit_length_keeps_the_short_rows(task):
    short = limit_length(task.train_dataset, 5)
    assert short["input_ids"] == [bits for bits in task.train_dataset["input_ids"] if len(bits) <= 5]
    assert limit_length(short, 3)["labels"] == [row["labels"] for row in short if len(row["input_ids"]) <= 3]
    with pytest.raises(ValueError, match="no row has at most 1 tokens; the shortest has 2"):
        limit_length(task.train_dataset, 1)


def test_a_batch_and_its_accuracy(task):
    rows = [task.train_dataset[index] for index in range(8)]
    batch = task.data_collator(rows)
    assert batch["labels"].tolist() == [row["labels"] for row in rows]
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == task.processing_class.pad_token_id).all()
    assert len(task.processing_class) == 3
    logits = torch.eye(2)[[0, 1, 1, 0]]
    predictions = task.preprocess_logits_for_metrics((logits, "other outputs"), None).numpy()
    assert task.compute_metrics(EvalPrediction(predictions, np.array([0, 1, 0, 0]))) == {"accuracy": 0.75}
