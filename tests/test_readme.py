"""Every Python block of the README runs as printed, in order, given a target and its data."""

import re
import sys
from pathlib import Path

import pytest
import torch
from builders import VOCABULARY, arguments, gpt2, token_batch, token_rows
from transformers import GPT2Config

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_blocks_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a folder stands for the Hub's gpt2
    GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=3, n_head=2, n_positions=16).save_pretrained("gpt2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", "out", "--measure", "rsa"])
    target = gpt2()
    before = target.lm_head.weight.detach().clone()
    names = {"target": target, "args": arguments("out"), "dataset": token_rows()}
    names["loader"] = [{**token_batch(), "labels": token_batch()["input_ids"]}]
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    assert not torch.equal(target.lm_head.weight, before)
    assert names["loss"].requires_grad
    assert names["guidance"].measure == "rsa"
    order = [base.__name__ for base in names["GuidedSeq2SeqTrainer"].__mro__]
    assert order.index("GuidanceMixin") < order.index("Seq2SeqTrainer")


def test_the_tree_lists_what_there_is() -> None:
    tree = re.search(r"```\nhf_guidance/\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert tree
    listed = {line.split()[0] for line in tree[1].splitlines() if line.startswith("  ")}
    package = README.parent / "hf_guidance"
    there = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    there |= {f"{path.parent.name}/" for path in package.glob("*/*") if path.suffix in (".py", ".jinja")}
    assert listed == there
