"""The guide's forward: packed documents are documents to it, and it keeps no cache of keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import VOCABULARY, gpt2, llama, seeded, t5, token_batch, token_rows
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    PreTrainedModel,
)

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.forward import forward


def documents(*lengths: int) -> list[dict[str, Any]]:
    rows = token_rows(len(lengths), max(lengths))
    return [{name: value[:n].tolist() for name, value in row.items()} for row, n in zip(rows, lengths, strict=True)]


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


def test_a_padded_batch_of_torchs_own_encoder_is_read_layer_by_layer() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layers(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)

    fast = torch.backends.mha.get_fastpath_enabled()
    lengths, losses = torch.tensor([5, 2, 4, 1, 3, 5, 4, 2]), []
    guidance = GuidanceLoss(gpt2(), seeded(Encoder, 0), GuidanceConfig(guide_layers=["layers.layers.*"]))
    for length in (5, 9):
        ids = token_batch(8, length)["input_ids"][:, :5]
        batch = {"input_ids": torch.nn.functional.pad(ids, (0, length - 5)), "labels": ids}
        batch["input_ids"][:, :5] = token_batch(8, 5)["input_ids"]
        batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        with guidance.watch(batch) as watched:
            guidance.target(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses.append(watched.loss)
    torch.testing.assert_close(*losses)
    assert torch.backends.mha.get_fastpath_enabled() == fast
