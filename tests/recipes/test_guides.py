"""Every Python block of the guides runs as printed, in order, from a temporary folder, without a network.

A pretrained network that a guide names, such as `gpt2`, is a tiny one here: a folder of that name, which is found
before the Hub. A block after `<!-- needs trl -->` runs where that package is installed. A block that begins with a
comment such as `# measures.py` is a file, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
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
    TrainingArguments,
)

from hf_guidance import GuidanceConfig
from hf_guidance.commands import comparing, inspecting, listing
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
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, eos_token="[SEP]", **names)


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
    "sentence-transformers/all-MiniLM-L6-v2": (encoder(BertConfig, BertForMaskedLM), 60),
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
    assert bool(uploads) == (path.stem == "publish")


# ------------------------------------------------------------------------------------- commands, links, the index


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each line of the shell blocks, comments and variables in front left out."""
    lines = (line for language, _, code, _ in blocks_of(text) if language == "sh" for line in code.splitlines())
    split = (shlex.split(line, comments=True) for line in lines)
    return [words[next(i for i, word in enumerate(words) if "=" not in word) :] for words in split if words]


def flags_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}


def fields_of(*kinds: Any) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def check_launch(words: list[str]) -> None:
    """Check `accelerate launch … recipes/x.py …`: the files exist, and each flag is one of accelerate's or of these."""
    recipe = next(word for word in words if word.endswith(".py"))
    assert all((ROOT / word).is_file() for word in words if re.fullmatch(r"recipes/\S+\.(py|yaml)", word))
    place = words.index(recipe)
    launched = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert {f"--{flag}" for flag in flags_of(words[:place])} <= launched
    spec = importlib.util.spec_from_file_location(Path(recipe).stem, ROOT / recipe)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for types
    spec.loader.exec_module(module)
    assert flags_of(words[place + 1 :]) <= fields_of(module.Arguments, TrainingArguments, GuidanceConfig)


def check_own_command(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    comparing.add_command(commands)
    inspecting.add_command(commands)
    listing.add_command(commands)
    parser.parse_args(words)  # exits if it does not know them


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert all(f'"--{flag}"' in script.read_text(encoding="utf-8") for flag in flags_of(words[1:]))


def check_command(words: list[str]) -> None:
    if words[:2] == ["accelerate", "launch"]:
        check_launch(words[2:])
    elif words[0] == "hf-guidance":
        check_own_command(words[1:])
    elif words[0] == "python":
        check_script(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        raise AssertionError(f"no check knows {words[0]!r}")


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_commands_name_files_and_flags_that_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    for words in commands_of(PAGES[path]):
        check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch recipes/which_prior.py --no_such_flag",
        "accelerate launch --no_such_flag recipes/which_prior.py",
        "accelerate launch recipes/no_such.py",
        "hf-guidance compare a b --no_such_flag",
        "python tests/scripts/stops.py --no_such_flag",
        "make no-such-target",
        "rm -r outputs",
    ],
)
def test_a_wrong_command_would_be_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, OSError)):
        check_command(shlex.split(command))


def anchors_of(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[path]):
        file, _, anchor = link.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), link
        assert not anchor or anchor in anchors_of(page.read_text(encoding="utf-8")), link


def test_the_index_names_every_guide_once() -> None:
    index = PAGES[ROOT / "recipes" / "guides" / "README.md"]
    lines = re.findall(r"^\| \[[^\]]+\]\(([\w.]+)\)", index, re.MULTILINE)
    there = [path.name for path in (ROOT / "recipes" / "guides").iterdir() if path.suffix in (".md", ".ipynb")]
    assert sorted(lines) == sorted(name for name in there if name != "README.md")
