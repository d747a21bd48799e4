"""Data for two networks: texts by their tokenizers, images by their formats."""

from __future__ import annotations

import argparse
from pathlib import Path

import PIL.Image
import pytest
from builders import gpt2, llama
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_guidance.commands.data import (
    add_flags,
    check_flags,
    images,
    images_with_classes,
    lines_of,
    read,
    texts,
    tokenizer_of,
)
from hf_guidance.tasks.image_decoding import PixelFormat

WORDS = ["[PAD]", "[UNK]", "the", "cat", "sat", "on", "mat"]


def tokenizer(folder: Path, words: list[str] = WORDS, pad: str | None = "[PAD]") -> str:
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token=pad).save_pretrained(folder)
    return str(folder)


def two_networks_and_a_text(folder: Path) -> list[str]:
    """Save two language models with their tokenizers and a text; return the words that name them on a command line."""
    for name, network in (("a", gpt2()), ("b", llama())):
        network.save_pretrained(folder / name)
        tokenizer(folder / name)
    lines = [" ".join(WORDS[2 + (i * j) % 5] for j in range(1, 5 + i % 3)) for i in range(60)]
    (folder / "t.txt").write_text("\n".join(lines))
    return [str(folder / "a"), str(folder / "b"), "--data", str(folder / "t.txt")]


def test_lines_become_padded_tokens_of_both_networks(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sat\n\n  \nthe mat\nthe cat sat on the mat\n")
    same, other = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", [*WORDS[:2], *reversed(WORDS[2:])])
    data = texts(str(tmp_path / "t.txt"), None, same, same, 4, None)
    batch = data.collator(list(data.rows))
    assert batch["input_ids"].tolist() == [[2, 3, 4, 0], [2, 6, 0, 0], [2, 3, 4, 5]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 4]
    assert batch.keys() <= {"input_ids", "attention_mask", "token_type_ids"}
    both = texts(str(tmp_path / "t.txt"), None, same, other, 4, None)
    assert both.collator(list(both.rows))["guide_input_ids"][0].tolist() == [6, 5, 4, 0]


def test_the_column_and_split_of_a_dataset_are_found_or_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    place, own = tmp_path / "d", tokenizer(tmp_path / "a")
    place.mkdir()
    for split, words in (("train", ["the", "cat"]), ("test", ["on", " "])):
        rows = {"n": list(range(len(words))), "title": ["mat"] * len(words), "text": words}
        datasets.Dataset.from_dict(rows).to_parquet(place / f"{split}.parquet")
    assert texts(str(place), None, own, own, 4, None).rows == ["on"]
    assert texts(str(place), None, own, own, 4, "title", "train").rows == ["mat", "mat"]
    for changes, said in (
        ({"column": "n"}, "no text in n"),
        ({"column": "zzz"}, r"columns n, title, text, but no text in zzz.*title, text"),
        ({"split": "dev"}, "no split 'dev'; it has"),
    ):
        given = {"column": None, "split": None, **changes}
        with pytest.raises(ValueError, match=said):
            texts(str(place), None, own, own, 4, given["column"], given["split"])


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"old\.txt is not UTF-8 \(.* at byte 2\): convert it"):
        lines_of(str(tmp_path / "old.txt"))


def test_a_file_without_text_and_a_network_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"e\.txt has no text"):
        lines_of(str(tmp_path / "e.txt"))
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        tokenizer_of(str(tmp_path / "nothing"))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())).save_pretrained(tmp_path / "mute")
    with pytest.raises(ValueError, match="makes no tokens of a text"):
        tokenizer_of(str(tmp_path / "mute"))
    without = tokenizer_of(tokenizer(tmp_path / "c", pad=None))
    assert without.pad_token is not None


def test_images_come_in_the_format_of_each_network() -> None:
    small, large = PixelFormat(8), PixelFormat(16)
    data = images("digits", None, small, large, None)
    batch = data.collator([data.rows[i] for i in range(3)])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (3, 3, 8, 8),
        "guide_pixel_values": (3, 3, 16, 16),
    }
    assert "guide_pixel_values" not in images("digits", None, small, small, None).collator([data.rows[0]])


def test_images_to_compare_need_no_classes_and_are_a_whole_split(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for number in range(6):
        PIL.Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    small = PixelFormat(8)
    assert len(images(str(tmp_path), None, small, small, None).rows) == 6
    of_digits = [len(images("digits", None, small, small, None, split).rows) for split in (None, "train", "test")]
    assert of_digits == [300, 1197, 300]
    with pytest.raises(ValueError, match=r"digits has no split 'dev'; it has train, validation, test"):
        images("digits", None, small, small, None, "dev")
    with pytest.raises(ValueError, match=r"the one with the images is not among them: name it with --column"):
        images("digits", None, small, small, "picture")


def test_rows_to_train_on_have_classes_and_come_first_from_the_training_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    small = PixelFormat(8)
    data = images_with_classes("digits", None, small, small, None)
    assert data.classes == 10
    assert len(data.rows) > 1000
    assert data.collator([data.rows[0]])["labels"].shape == (1,)
    own = tokenizer(tmp_path / "a")
    (tmp_path / "d").mkdir()
    for split, word in (("train", "cat"), ("validation", "mat")):
        datasets.Dataset.from_dict({"text": [word]}).to_parquet(tmp_path / "d" / f"{split}.parquet")
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = parser.parse_args(["--data", str(tmp_path / "d")])
    for training, word in ((True, "cat"), (False, "mat")):
        assert list(read(given, "text", (own, own), (None, None), training=training).rows) == [word]


def test_numbers_that_make_no_batch_are_named() -> None:
    for name in ("batch_size", "max_length", "image_size"):
        given = argparse.Namespace(**{"batch_size": 2, "max_length": 2, "image_size": None, name: 0})
        with pytest.raises(ValueError, match=f"--{name} is 0; it must be at least 1"):
            check_flags(given)
