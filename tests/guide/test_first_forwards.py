"""On its first batch a guide that is random is refused, and one that mixes packed documents is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from builders import VOCABULARY, gpt2, llama, seeded, token_batch, token_rows
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    PreTrainedModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.first_forwards import check_is_not_random
from hf_guidance.guide.forward import GuideRunning

VIT: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
VIT |= {"image_size": 16, "patch_size": 8}


def documents(*lengths: int) -> list[dict[str, Any]]:
    rows = token_rows(len(lengths), max(lengths))
    return [{name: value[:n].tolist() for name, value in row.items()} for row, n in zip(rows, lengths, strict=True)]


def bert() -> BertModel:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8}
    return seeded(lambda: BertModel(BertConfig(**sizes, num_attention_heads=2, initializer_range=1.0)), 0)


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


class Masking(nn.Module):
    """A guide that draws random numbers in evaluation mode too, and masks its tokens by them or not."""

    def __init__(self, share: float, draw: Callable[[torch.Size], Any] = torch.rand) -> None:
        super().__init__()
        self.embed, self.masked = nn.Embedding(VOCABULARY, 8), nn.Identity()
        self.share, self.draw = share, draw
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.forwards += 1
        return self.masked(self.embed(input_ids) * torch.as_tensor(self.draw(input_ids.shape) >= self.share)[..., None])


def test_a_guide_whose_features_differ_in_each_forward_is_refused() -> None:
    vit_mae = ViTMAEModel(ViTMAEConfig(**VIT, decoder_hidden_size=8, decoder_num_attention_heads=2))
    loss = GuidanceLoss(ViTModel(ViTConfig(**VIT)), vit_mae, GuidanceConfig(measure="linear_cka"))
    words = r"the guide \(ViTMAEModel\) is random: two forwards .* of ViTMAEModel in ViTModel\)"
    with pytest.raises(ValueError, match=words), loss.watch({"pixel_values": torch.randn(4, 3, 16, 16)}):
        pass


@pytest.mark.parametrize("draw", [torch.rand, np.random.random_sample])
def test_a_guide_that_masks_at_random_is_refused_whatever_draws(draw) -> None:
    guide = Masking(0.5, draw)
    running = GuideRunning(LayerReader(guide, ["masked"], "guide"), gpt2(), GuidanceConfig(), nullcontext)
    with pytest.raises(ValueError, match=r"the guide \(Masking\) is random: .* in layer masked, so that"):
        running.read(token_batch(), lambda _, features: features)


def test_random_numbers_that_change_nothing_are_no_harm_and_are_looked_at_once() -> None:
    guide = Masking(0.0)
    loss = GuidanceLoss(gpt2(), guide, GuidanceConfig(guide_layers=["masked"]))
    for forwards in (3, 4):  # two more after the first
        next_forward(loss)
        assert int(guide.forwards) == forwards


def next_forward(loss: GuidanceLoss) -> None:
    with loss.watch(token_batch()) as watched:
        loss.target(**watched.inputs)


def test_two_forwards_that_give_other_shapes_are_random_too() -> None:
    lengths = iter((3, 4))

    def read(inputs: Any, reduce: Callable[[str, Any], Any]) -> dict[str, Any]:
        return {"h": reduce("h", torch.ones(2, next(lengths)))}

    with pytest.raises(ValueError, match=r"the guide \(Identity\) is random: .* differ by 1e\+02 % in layer h"):
        check_is_not_random(nn.Identity(), read, {})
