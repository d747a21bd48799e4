"""Language modelling: blocks against the text, perplexity of a uniform model, streams, and what can be missing."""

import math
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer, EvalPrediction, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_guidance.tasks import language_modeling

VOCAB, BLOCK = 300, 16
SMALL = {"vocab_size": VOCAB, "block_size": BLOCK}


def make_text(num_lines=400):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghéü"), rng.integers(1, 8))) for _ in range(200)]
    return "".join(" ".join(rng.choice(words, rng.integers(3, 12))) + "\n" for _ in range(num_lines))


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # five seconds after every stream


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def task(text_file):
    return language_modeling(text_files=[text_file], **SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same text as a dataset folder: one line a row, without its line break, and some empty rows."""
    root = tmp_path_factory.mktemp("dataset")
    rows = make_text().splitlines()
    write_splits(root, {"train": [*rows[:300], "", *rows[300:340]], "validation": rows[340:370], "test": rows[370:]})
    return str(root)


def write_splits(root, splits, column="text"):
    (root / "data").mkdir()
    for name, rows in splits.items():
        table = pa.table({column: rows, "other": list(range(len(rows)))})
        pyarrow.parquet.write_table(table, root / "data" / f"{name}-00000-of-00001.parquet")


def written(tokenizer, dataset):
    return tokenizer.decode([token for row in dataset["input_ids"] for token in row])


def test_files_are_cut_at_line_ends_into_90_5_and_5_percent(task):
    text = make_text()
    train, held_out, test = (
        written(task.processing_class, split) for split in (task.train_dataset, task.eval_dataset, task.test_dataset)
    )
    assert text.startswith(train)
    starts = [text.index(part) for part in (held_out, test)]
    assert [start / len(text) for start in starts] == pytest.approx([0.90, 0.95], abs=0.01)
    assert all(text[start - 1] == "\n" for start in starts)
    assert len(train) < starts[0] < starts[0] + len(held_out) <= starts[1]
    assert len(text) - starts[1] - len(test) < 8 * BLOCK  # only a last, unfilled block is dropped


def test_rows_are_full_blocks_labelled_with_themselves(task):
    for split in (task.train_dataset, task.eval_dataset, task.test_dataset):
        assert {len(row) for row in split["input_ids"]} == {BLOCK}
        assert all(row["labels"] == row["input_ids"] for row in split)
    batch = task.data_collator([task.eval_dataset[index] for index in range(3)])
    assert batch["input_ids"].shape == batch["labels"].shape == (3, BLOCK)


def test_several_files_are_one_text(tmp_path, task):
    lines = make_text().splitlines(keepends=True)
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for path, part in zip(paths, (lines[:150], lines[150:]), strict=True):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(part)
    both = language_modeling(text_files=paths, **SMALL)
    assert both.train_dataset[:] == task.train_dataset[:]
    assert both.processing_class.get_vocab() == task.processing_class.get_vocab()


def test_the_byte_pairs_can_write_anything_and_see_only_the_training_text(tmp_path, text_file, task):
    tokenizer = task.processing_class
    assert len(tokenizer) == VOCAB
    for string in (make_text(20), "Ω — not in the text\n\n  at all"):
        assert tokenizer.decode(tokenizer(string)["input_ids"]) == string
    other_end = tmp_path / "text.txt"
    other_end.write_text(make_text()[: int(0.92 * len(make_text()))] + "zzzz zzzz\n" * 60, encoding="utf-8")
    assert "zz" not in language_modeling(text_files=[str(other_end)], **SMALL).processing_class.get_vocab()


def test_a_named_tokenizer_is_used_as_it_is(tmp_path, text_file, task):
    task.processing_class.save_pretrained(tmp_path)
    named = language_modeling(text_files=[text_file], tokenizer=str(tmp_path), block_size=BLOCK)
    assert named.train_dataset[:] == task.train_dataset[:]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == named.processing_class.get_vocab()


class Unigram(PreTrainedModel):
    """Not a network: gives every token the same logit everywhere."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, logits):
        super().__init__(PreTrainedConfig())
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, labels=None):
        return CausalLMOutput(loss=self.logits.sum(), logits=self.logits.expand(*input_ids.shape, -1))


def evaluate(task, logits, folder, split="eval_dataset"):
    arguments = TrainingArguments(
        str(folder), per_device_eval_batch_size=5, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(
        Unigram(logits),
        arguments,
        data_collator=task.data_collator,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
    )
    return trainer.evaluate(getattr(task, split))


@pytest.mark.parametrize("split", ["eval_dataset", "test_dataset"])
def test_a_uniform_model_has_the_vocabulary_size_as_its_perplexity(split, task, tmp_path):
    metrics = evaluate(task, torch.zeros(VOCAB), tmp_path, split)
    assert metrics["eval_perplexity"] == pytest.approx(VOCAB, rel=1e-6)
    text = make_text()
    blocks = getattr(task, split)
    start = text.index(written(task.processing_class, blocks))
    scored = text[start:][: len(written(task.processing_class, blocks))]
    tokens_per_word = len(blocks) * BLOCK / len(re.findall(r"\S+", scored))
    assert tokens_per_word > 1.5
    assert metrics["eval_word_perplexity"] == pytest.approx(VOCAB**tokens_per_word, rel=1e-5)


def test_perplexity_is_the_exponential_of_the_mean_over_predicted_tokens(task, tmp_path):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum()
    losses = [-math.log(probabilities[token]) for row in task.eval_dataset["input_ids"] for token in row[1:]]
    metrics = evaluate(task, logits, tmp_path)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert (task.metric, task.higher_is_better) == ("perplexity", False)


def test_losses_of_unlabelled_tokens_do_not_count(task):
    rows = np.array(task.eval_dataset["input_ids"][:2])
    labels = torch.tensor(np.where(np.arange(BLOCK) < 9, rows, -100))
    losses = task.preprocess_logits_for_metrics((torch.zeros(2, BLOCK, VOCAB), "more"), labels)
    assert losses.shape == (2, BLOCK - 1)
    result = task.compute_metrics(EvalPrediction(losses.numpy(), labels.numpy()))
    assert result["perplexity"] == pytest.approx(VOCAB, rel=1e-6)


def test_a_dataset_streams_into_shuffled_blocks(folder):
    task = language_modeling(folder, "default", **SMALL)
    assert isinstance(task.train_dataset, datasets.IterableDataset)
    rows = list(task.train_dataset)
    assert {len(row["input_ids"]) for row in rows} == {BLOCK}
    assert all(row["labels"] == row["input_ids"] for row in rows)
    held = language_modeling(folder, "default", streaming=False, **SMALL)
    assert [row["input_ids"] for row in rows] != list(held.train_dataset["input_ids"])
    assert sorted(row["input_ids"] for row in rows) == sorted(held.train_dataset["input_ids"])
    assert held.eval_dataset[:] == task.eval_dataset[:]


def test_a_stream_keeps_its_order_for_a_seed_and_skips_empty_rows(folder):
    one, same, other = (language_modeling(folder, None, seed=seed, **SMALL) for seed in (0, 0, 1))
    rows = [[row["input_ids"] for row in task.train_dataset] for task in (one, same, other)]
    assert rows[0] == rows[1] != rows[2]
    lines = make_text().splitlines(keepends=True)
    in_order = language_modeling(folder, None, streaming=False, **SMALL)
    assert "".join(lines[:340]).startswith(written(in_order.processing_class, in_order.train_dataset))


def test_evaluation_is_limited_to_the_first_blocks(text_file, task):
    limited = language_modeling(text_files=[text_file], max_eval_blocks=3, **SMALL)
    assert limited.eval_dataset[:] == task.eval_dataset[:3]
    assert limited.test_dataset[:] == task.test_dataset[:3]
    assert limited.train_dataset[:] == task.train_dataset[:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 1}, "block_size must be at least 2.*got 1"),
        ({"max_eval_blocks": 0}, "max_eval_blocks must be at least 1, got 0"),
        ({"vocab_size": 256}, "vocab_size must exceed the 256 bytes, got 256"),
        ({"block_size": 2000}, "the validation text has .* tokens, too few for one block of 2000; give more text"),
    ],
)
def test_impossible_sizes_say_why(options, words, text_file):
    with pytest.raises(ValueError, match=words):
        language_modeling(text_files=[text_file], **{**SMALL, **options})


def test_missing_and_empty_files(tmp_path, text_file):
    with pytest.raises(ValueError, match=r"text file not found: nowhere.txt .*; give paths of UTF-8 files"):
        language_modeling(text_files=[text_file, "nowhere.txt"])
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match=r"no text in .*empty.txt; give files with some text"):
        language_modeling(text_files=[str(empty)])


def test_missing_splits_and_columns(tmp_path):
    rows = make_text(30).splitlines()
    for name in ("no_test", "no_text"):
        (tmp_path / name).mkdir()
    write_splits(tmp_path / "no_test", {"train": rows, "validation": rows})
    with pytest.raises(ValueError, match="has no split test; it has train, validation"):
        language_modeling(str(tmp_path / "no_test"), None)
    write_splits(tmp_path / "no_text", {"train": rows, "validation": rows, "test": rows}, column="lines")
    with pytest.raises(ValueError, match=r"the train split of .* has no column 'text', but \['lines', 'other'\]"):
        language_modeling(str(tmp_path / "no_text"), None)
    (tmp_path / "short").mkdir()
    write_splits(tmp_path / "short", {"train": rows, "validation": rows, "test": rows})
    with pytest.raises(ValueError, match="the train text is too short for one block of 100000 tokens"):
        language_modeling(str(tmp_path / "short"), None, block_size=100_000)
