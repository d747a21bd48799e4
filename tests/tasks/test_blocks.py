"""Rows of equally many tokens: where files are cut, what is dropped, and what is missing."""

import pytest
from datasets import Dataset

from hf_guidance.tasks.blocks import lines, load_splits, make_blocks, read_files, stream_blocks
from hf_guidance.tasks.vocabulary import symbol_tokenizer

DIGITS = symbol_tokenizer(list("0123456789"))  # each digit is its own token


def rows(*texts):
    return Dataset.from_dict({"text": list(texts)})


def test_files_are_cut_at_line_ends_after_90_and_95_percent(tmp_path):
    for name, start in (("a", 0), ("b", 50)):
        (tmp_path / name).write_text("".join(f"line {start + i:02}\n" for i in range(50)), encoding="utf-8")
    splits = read_files([str(tmp_path / "a"), str(tmp_path / "b")])
    text = [f"line {i:02}\n" for i in range(100)]
    assert [len(splits[name]["text"]) for name in ("train", "validation", "test")] == pytest.approx([90, 5, 5], abs=1)
    assert [row for split in splits.values() for row in split["text"]] == text


def test_every_line_ends_in_a_break_and_empty_rows_are_left_out():
    assert list(lines([{"text": "a"}, {"text": ""}, {"text": "b\n"}])) == ["a\n", "b\n"]


def test_blocks_are_the_text_without_what_fills_no_block():
    blocks = make_blocks(rows("1 2 3", "", "4 5 6 7", "8"), "train", DIGITS, 3)
    assert blocks["input_ids"][:] == blocks["labels"][:] == [[1, 2, 3], [4, 5, 6]]
    assert make_blocks(rows("1 2 3 4"), "train", DIGITS, 2, limit=1)["input_ids"][:] == [[1, 2]]
    with pytest.raises(ValueError, match="the train text has 2 tokens, too few for one block of 3; give more"):
        make_blocks(rows("1 2"), "train", DIGITS, 3)


def test_a_stream_has_the_same_blocks_in_another_order_for_each_seed():
    text = rows(*(" ".join(str((i * i + j) % 10) for j in range(6)) for i in range(30)))
    held = make_blocks(text, "train", DIGITS, 4)["input_ids"][:]
    streams = [
        [row["input_ids"] for row in stream_blocks(text.to_iterable_dataset(), DIGITS, 4, seed)] for seed in (0, 0, 1)
    ]
    assert streams[0] == streams[1] != streams[2]
    assert sorted(streams[0]) == sorted(streams[2]) == sorted(held)
    with pytest.raises(ValueError, match="too short for one block of 1000 tokens; lower block_size"):
        stream_blocks(text.to_iterable_dataset(), DIGITS, 1000, 0)


def test_a_missing_split_and_column_are_named(tmp_path):
    (folder := tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        rows("0 1").to_json(folder / f"{name}.jsonl")
    with pytest.raises(ValueError, match="has no split test; it has train, validation, and all of train, validation, "):
        load_splits(str(folder), None, streaming=False)
    rows("2 3").to_json(folder / "test.jsonl")
    assert load_splits(str(folder), None, streaming=False)["test"]["text"][:] == ["2 3"]
    for name in ("train", "validation", "test"):
        Dataset.from_dict({"words": ["0 1"]}).to_json(folder / f"{name}.jsonl")
    with pytest.raises(ValueError, match=r"the train split of .* has no column 'text', but \['words'\]"):
        load_splits(str(folder), None, streaming=True)
