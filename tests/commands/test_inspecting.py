"""A target and a guide inspected from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, gpt2, t5
from test_data import tokenizer, two_networks_and_a_text
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, PreTrainedTokenizerFast

from hf_guidance import GuidanceConfig
from hf_guidance.commands import inspecting
from hf_guidance.commands.inspecting import for_training, labels_of
from hf_guidance.commands.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two networks with tokenizers, a text, and a folder for the results."""
    own = ["--output", str(tmp_path / "found"), "--batch_size", "16"]
    return ["inspect", *two_networks_and_a_text(tmp_path), *own]


def proposal(tmp_path: Path) -> GuidanceConfig:
    parser: Any = HfArgumentParser(GuidanceConfig)
    (found,) = parser.parse_yaml_file(str(tmp_path / "found" / "guidance.yaml"))
    return found


def test_two_language_models_are_inspected(texts: list[str], tmp_path: Path, capsys: Output) -> None:
    assert main([*texts, "--batches", "2"]) == 0
    printed = capsys.readouterr().out
    assert "GPT2LMHeadModel guided by LlamaModel, over 2 batches of 16 rows" in printed
    assert f"{tmp_path}/found/guidance.yaml, {tmp_path}/found/inspection.json" in printed
    assert proposal(tmp_path).sample_axis == "token"
    content = json.loads((tmp_path / "found" / "inspection.json").read_text())
    assert content["measured"]["gradient_ratio"]["mean"] > 0


def test_masked_and_encoder_decoder_targets_have_their_tasks(texts: list[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes))
    for name, network in (("bert", bert), ("t5", t5())):
        network.save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name)
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "bert", mask_token="[UNK]").save_pretrained(tmp_path / "bert")
    for target, guide in (("bert", "b"), ("t5", "t5"), ("bert", "t5")):
        assert main(["inspect", str(tmp_path / target), str(tmp_path / guide), *texts[3:], "--batches", "1"]) == 0


def test_two_image_networks_with_random_weights_are_inspected(tmp_path: Path, capsys: Output) -> None:
    words = ["inspect", "timm/resnet10t", "timm/resnet10t", "--untrained_target", "0", "--untrained_guide", "1"]
    words += ["--data", "digits", "--image_size", "32", "--batches", "1", "--output", str(tmp_path / "found")]
    assert main(words) == 0
    assert "over 1 batch of 32 rows" in capsys.readouterr().out
    assert (proposal(tmp_path).measure, proposal(tmp_path).sample_axis) == ("ridge_loo", "sequence")


def test_what_cannot_be_inspected_is_one_line(texts: list[str], tmp_path: Path, capsys: Output) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "file").write_text("")
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict({"n": [1, 2]}).to_parquet(tmp_path / "d" / "train.parquet")
    other = [*texts[:2], "timm/resnet10t", "--untrained_guide", "0", *texts[3:]]
    columns = [*texts[:4], str(tmp_path / "d"), *texts[5:]]
    for words, said in (
        (other, "takes text and timm/resnet10t images: two networks need the same data"),
        (columns, "has columns n, but no text in any: name one of strings with --column"),
        ([*texts[:-1], "64"], "have 60 rows, fewer than one batch of 64: lower --batch_size"),
        ([*texts, "--batches", "0"], "batches is 0; it must be a whole number, at least 1"),
        ([*texts, "--output", str(tmp_path / "file" / "c")], "--output"),
        ([*texts, "--device", "nowhere"], "--device is nowhere, which is not there"),
        ([*texts, "--measure", "cka"], "Unknown measure 'cka'"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("hf-guidance inspect: error: ")
        assert said in error


def test_the_report_is_printed_before_it_cannot_be_saved(
    texts: list[str], tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspecting, "check_writable", lambda *_: None)
    (tmp_path / "found").write_text("no folder")
    assert main([*texts, "--batches", "1"]) == 1
    seen = capsys.readouterr()
    assert "proposal\n" in seen.out
    assert "hf-guidance inspect: error:" in seen.err


def test_labels_are_the_tokens_without_padding_or_those_that_were_masked(tmp_path: Path) -> None:
    place = tokenizer(tmp_path / "a")
    batch = {"input_ids": torch.tensor([[2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert labels_of("AutoModelForCausalLM", place)(batch)["labels"].tolist() == [[2, 3, -100]]
    with pytest.raises(ValueError, match="its tokenizer has no mask_token"):
        labels_of("AutoModelForMaskedLM", place)
    PreTrainedTokenizerFast.from_pretrained(place, mask_token="[UNK]").save_pretrained(place)
    long = {"input_ids": torch.full((1, 400), 5)}
    found = labels_of("AutoModelForMaskedLM", place)(long)
    assert 20 < int((found["labels"] == 5).sum()) < 120
    assert long["input_ids"].unique().tolist() == [5]


def test_each_network_gets_the_columns_that_it_accepts() -> None:
    tokens = dict.fromkeys(("input_ids", "attention_mask", "decoder_input_ids"), torch.ones(1, 2, dtype=torch.long))
    of_both = for_training(lambda rows: tokens, t5(), t5(), labels_of("AutoModelForSeq2SeqLM", ""))([])
    assert of_both.keys() == {*tokens, "labels"}
    apart = for_training(lambda rows: tokens, gpt2(), t5(), labels_of("AutoModelForCausalLM", ""))([])
    assert apart.keys() == {"input_ids", "attention_mask", "labels", *(f"guide_{name}" for name in tokens)}
