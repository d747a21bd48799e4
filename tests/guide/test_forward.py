"""The guide's forward: packed documents are documents to it, and it keeps no cache of keys and values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from builders import VOCABULARY, gpt2, llama, seeded, t5, token_rows
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DataCollatorWithFlattening, DynamicCache, PreTrainedModel

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.forward import forward


def documents(*lengths: int) -> list[dict[str, Any]]:
    rows = token_rows(len(lengths), max(lengths))
    return [{name: value[:n].tolist() for name, value in row.items()} for row, n in zip(rows, lengths, strict=True)]


def bert() -> BertModel:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8}
    return seeded(lambda: BertModel(BertConfig(**sizes, num_attention_heads=2, initializer_range=1.0)), 0)


def states(guide: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with LayerReader(guide, ["hidden_states"], "guide").reading(lambda _, output: output) as read, torch.no_grad():
        forward(guide, inputs)
    return list(read.values())


@pytest.mark.parametrize("guide", [llama(), gpt2().transformer], ids=["rotary", "learned positions"])
def test_packed_documents_give_the_features_of_each_alone(guide: PreTrainedModel) -> None:
    rows = documents(3, 7, 5)
    guide.eval()
    packed = states(guide, DataCollatorWithFlattening(return_tensors="pt")(rows))
    alone = [states(guide, {"input_ids": torch.tensor([row["input_ids"]])}) for row in rows]
    for layer, together in enumerate(packed):
        torch.testing.assert_close(together, torch.cat([each[layer] for each in alone], 1))


def test_the_guidance_loss_of_packed_documents_is_that_of_padded_ones() -> None:
    rows, losses = documents(4, 6, 6), []
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = torch.arange(6) < torch.tensor([[4], [6], [6]])
    for batch in (
        DataCollatorWithFlattening(return_tensors="pt")(rows),
        {"input_ids": ids, "attention_mask": mask * 1},
    ):
        target = gpt2()
        loss = GuidanceLoss(target, llama(), GuidanceConfig(sample_axis="token"))
        with loss.watch(batch) as watched:
            target(**watched.inputs, use_cache=False)
        losses.append(watched.loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("guide", "told"), [(bert(), True), (llama(), False)], ids=["bert", "llama"])
def test_a_guide_that_does_not_tell_documents_apart_is_said(
    guide: PreTrainedModel, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    target = gpt2()
    loss = GuidanceLoss(target, guide, GuidanceConfig(sample_axis="token"))
    for _ in range(2):
        with loss.watch(DataCollatorWithFlattening(return_tensors="pt")(documents(4, 6, 6))) as watched:
            target(**watched.inputs)
    words = (
        r"The guide \(BertModel\) does not tell packed documents apart: features of the second document differ by \d+ %"
    )
    assert len(re.findall(words, caplog.text)) == told


@pytest.mark.parametrize("guide", [llama(), gpt2(), t5()], ids=lambda guide: type(guide).__name__)
def test_no_guide_makes_a_cache(guide: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "__init__", lambda *args, **kwargs: pytest.fail("a cache"))
    inputs = {"input_ids": torch.arange(5)[None]}
    forward(guide, inputs | ({"decoder_input_ids": inputs["input_ids"]} if guide.config.is_encoder_decoder else {}))


def test_a_guide_that_takes_no_use_cache_is_given_none() -> None:
    seen: dict[str, Any] = {}

    class Own(nn.Module):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
            seen.update(kwargs)
            return input_ids

    forward(Own(), {"input_ids": torch.arange(5)[None]})
    assert seen == {}
