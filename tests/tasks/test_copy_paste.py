"""Copy-paste: rows against a plain loop, splits, and a perfect copier through a real `Trainer.evaluate`."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_guidance.tasks import TASKS, build_task, copy_paste

SIZES = {"train_size": 400, "eval_size": 60, "test_size": 50}
SHORT = {"min_length": 3, "max_length": 8, "num_symbols": 5, **SIZES}
COPY, BLANK, PAD = 5, 6, 7


def strings(dataset):
    return [tuple(row[: row.index(COPY)]) for row in dataset["input_ids"]]


def test_rows_are_string_marker_blanks_with_the_string_as_the_blanks_labels():
    task = copy_paste(**SHORT)
    assert [len(split) for split in (task.train_dataset, task.eval_dataset, task.test_dataset)] == [400, 60, 50]
    for row in task.train_dataset:
        length = row["input_ids"].index(COPY)
        string = row["input_ids"][:length]
        assert 3 <= length <= 8
        assert set(string) <= set(range(5))
        assert row["input_ids"] == [*string, COPY, *[BLANK] * length]
        assert row["labels"] == [-100] * (length + 1) + string


def test_lengths_and_symbols_are_uniform():
    task = copy_paste(**{**SHORT, "train_size": 6000})
    drawn = strings(task.train_dataset)
    lengths = np.bincount([len(string) for string in drawn])[3:]
    symbols = np.bincount([symbol for string in drawn for symbol in string])
    np.testing.assert_allclose(lengths / lengths.sum(), 1 / 6, atol=0.03)
    np.testing.assert_allclose(symbols / symbols.sum(), 1 / 5, atol=0.02)


@pytest.mark.parametrize("others", [{"seed": 1}, {"train_size": 300}, {"max_length": 12}])
def test_no_string_is_in_two_splits_whatever_the_seed_sizes_and_lengths(others):
    one, other = copy_paste(**SHORT), copy_paste(**{**SHORT, **others})
    for task in (one, other):
        for held_out in (task.eval_dataset, task.test_dataset):
            assert not set(strings(one.train_dataset)) & set(strings(held_out))
            assert not set(strings(other.train_dataset)) & set(strings(held_out))
    assert not set(strings(one.eval_dataset)) & set(strings(other.test_dataset))


def test_the_seed_decides_and_a_split_does_not_depend_on_the_size_of_another():
    one, same, larger, other = (
        copy_paste(**{**SHORT, **changed}) for changed in ({}, {}, {"train_size": 500}, {"seed": 1})
    )
    assert one.train_dataset[:] == same.train_dataset[:]
    assert one.eval_dataset[:] == same.eval_dataset[:] == larger.eval_dataset[:]
    assert one.eval_dataset[:] != other.eval_dataset[:]


def test_the_default_task_is_the_papers():
    task = copy_paste(train_size=100, eval_size=10, test_size=10)
    assert len(task.processing_class) == 13
    assert {row.index(10) for row in task.train_dataset["input_ids"]} <= set(range(20, 41))
    assert (task.metric, task.higher_is_better) == ("accuracy", True)


def test_the_tokenizer_reads_and_writes_the_rows_and_survives_saving(tmp_path):
    task = copy_paste(**SHORT)
    task.processing_class.save_pretrained(tmp_path)
    for tokenizer in (task.processing_class, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("3 0 4 <copy> <blank>")["input_ids"] == [3, 0, 4, COPY, BLANK]
        assert tokenizer.decode([3, 0, 4, COPY, BLANK]) == "3 0 4 <copy> <blank>"
        assert tokenizer.pad_token_id == PAD
        assert len(tokenizer) == 8
        with pytest.raises(Exception, match="UNK"):
            tokenizer("9")


def test_a_batch_is_padded_on_the_right_with_a_mask():
    task = copy_paste(**SHORT)
    rows = [task.train_dataset[index] for index in range(6)]
    batch = task.data_collator(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    for index, row in enumerate(rows):
        spare = longest - len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [PAD] * spare
        assert batch["attention_mask"][index].tolist() == [1] * len(row["input_ids"]) + [0] * spare
        assert batch["labels"][index].tolist() == row["labels"] + [-100] * spare


class Copier(PreTrainedModel):
    """Not a network: looks up the symbol that each position has to predict, and spoils some."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, spoil=0):
        super().__init__(PreTrainedConfig())
        self.spoil = spoil
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = torch.zeros(*input_ids.shape, 8)
        for row, ids in enumerate(input_ids.tolist()):
            length = ids.index(COPY)
            for offset in range(self.spoil, length):
                logits[row, length + offset, ids[offset]] = 1
            for offset in range(min(self.spoil, length)):  # a blank is never a symbol to copy
                logits[row, length + offset, BLANK] = 1
        return CausalLMOutput(loss=self.unused.sum(), logits=logits)


@pytest.mark.parametrize("spoil", [0, 2])
def test_accuracy_counts_the_copied_symbols_only(spoil, tmp_path):
    task = copy_paste(**SHORT)
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=7, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(
        Copier(spoil),
        arguments,
        eval_dataset=task.eval_dataset,
        data_collator=task.data_collator,
        processing_class=task.processing_class,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
    )
    lengths = [len(string) for string in strings(task.eval_dataset)]
    expected = sum(length - spoil for length in lengths) / sum(lengths)
    assert trainer.evaluate()[f"eval_{task.metric}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_length": 9}, "lengths must be 1 <= min_length <= max_length, got 9 and 8"),
        ({"num_symbols": 1}, "num_symbols must be at least 2, got 1"),
        ({"eval_size": 0}, "eval_size must be at least 1, got 0"),
        ({"min_length": 1, "max_length": 1, "num_symbols": 2}, "there are too few such strings; raise max_length"),
    ],
)
def test_impossible_tasks_say_why(options, words):
    with pytest.raises(ValueError, match=words):
        copy_paste(**{**SHORT, **options})


def test_build_task_knows_every_builder_by_its_name():
    assert {name: builder.__name__ for name, builder in TASKS.items()} == {name: name for name in TASKS}
    assert build_task("copy_paste", **SHORT).eval_dataset[:] == copy_paste(**SHORT).eval_dataset[:]


def test_build_task_lists_what_is_possible():
    with pytest.raises(ValueError, match=r"unknown task 'copypaste'; the tasks are copy_paste, .*mean 'copy_paste'\?"):
        build_task("copypaste")
    with pytest.raises(ValueError, match="task 'parity' has no option block_size; it has min_length, max_length"):
        build_task("parity", block_size=3)
