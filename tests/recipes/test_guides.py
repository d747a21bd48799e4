"""Every Python block of the guides runs as printed, in order, from a temporary folder, without a network.

A pretrained network that a guide names, such as `gpt2`, is a tiny one here: a folder of that name, which is found
before the Hub. A block after `<!-- needs trl -->` runs where that package is installed. A block that begins with a
comment such as `# measures.py` is a file, too.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    TimmWrapperConfig,
)

from hf_guidance.similarity import registry

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "recipes" / "guides").glob("*.md"))
CODE = re.compile(r"(?:<!-- needs ([\w ]+) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = {path: path.read_text(encoding="utf-8") for path in GUIDES}

TEXT = ["a guide steers the target", "the target learns what the guide knows", "guidance is one term of the loss"]


# ------------------------------------------------------------------------------------------------- tiny stand-ins


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a few words, with a vocabulary of `size` or fewer."""
    special = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.BPE(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    names = dict(zip(("pad_token", "unk_token", "mask_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)


def gpt2(size: int) -> PreTrainedModel:
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, **sizes))


def encoder(config: Any, network: Any) -> Callable[[int], PreTrainedModel]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return lambda size: network(config(vocab_size=size, max_position_embeddings=80, pad_token_id=0, **sizes))


def save_resnet(folder: Path) -> None:
    """Save a ResNet as timm's repositories have it, with the format of its images in the config."""
    config = {"architecture": "resnet18", "num_classes": 10, "num_labels": 10}
    AutoModelForImageClassification.from_config(TimmWrapperConfig.from_dict(config)).save_pretrained(folder)
    pixels = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center"}
    pixels |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pretrained_cfg": pixels}))


TEXT_MODELS: dict[str, tuple[Callable[[int], PreTrainedModel], int]] = {
    "gpt2": (gpt2, 60),
    "distilgpt2": (gpt2, 60),
    "google-bert/bert-base-uncased": (encoder(BertConfig, BertForMaskedLM), 60),
    "FacebookAI/roberta-base": (encoder(RobertaConfig, RobertaForMaskedLM), 44),
}
IMAGE_MODELS = {"timm/resnet18.a1_in1k": save_resnet}


def stand_in(name: str, folder: Path) -> None:
    """Save a tiny network, and the tokenizer of a text model, in a folder of the name."""
    if name in IMAGE_MODELS:
        IMAGE_MODELS[name](folder / name)
        return
    make, size = TEXT_MODELS[name]
    words = tokenizer(size)
    make(len(words)).save_pretrained(folder / name)
    words.save_pretrained(folder / name)


# --------------------------------------------------------------------------------------------------------- blocks


def blocks_of(text: str) -> Iterator[tuple[str, list[str], str, int]]:
    """Yield language, needed packages, code and first line of each block."""
    for found in CODE.finditer(text):
        needs, language, code = found.groups()
        yield language, (needs or "").split(), code, text[: found.start(3)].count("\n")


NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def check_printed(printed: str, stated: str) -> None:
    """Check that the last lines a block printed are those below it. Numbers may differ a little between machines."""
    printed = "\n".join(printed.splitlines()[-len(stated.splitlines()) :])
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", stated).split()
    assert [float(n) for n in NUMBER.findall(printed)] == pytest.approx(
        [float(n) for n in NUMBER.findall(stated)], rel=0.02, abs=0.02
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, without a network, whose traces in this process are removed."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a guide reached for the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(registry, "REGISTERED", dict(registry.REGISTERED))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_the_python_blocks_run_as_printed_one_after_another(path: Path, place: Path, uploads: list[Any]) -> None:
    text = PAGES[path]
    for name in (*TEXT_MODELS, *IMAGE_MODELS):
        if f'"{name}"' in text:
            stand_in(name, place)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    torch.manual_seed(0)
    for language, needs, code, line in blocks_of(text):
        if language == "text":
            check_printed(printed, code)
        if language != "python" or not all(importlib.util.find_spec(package) for package in needs):
            continue
        if own := re.match(r"# (\w+\.py)\n", code):
            (place / own[1]).write_text(code, encoding="utf-8")
        with redirect_stdout(io.StringIO()) as output:
            exec(compile("\n" * line + code, str(path), "exec"), names)  # lines of errors are those of the page
        printed = output.getvalue()
