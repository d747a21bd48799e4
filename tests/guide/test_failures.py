"""A guide that does not run on a batch says so in plain words, with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import VOCABULARY, gpt2, t5, token_batch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    TimmWrapperConfig,
    ViTConfig,
)

from hf_guidance import GuidanceConfig, GuidanceLoss, load_guide
from hf_guidance.features.rows import content_of
from hf_guidance.guide.failures import is_from_here
from hf_guidance.guide.forward import (
    forward,
)


def clip() -> CLIPModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def short() -> GPT2Model:
    return GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=4, vocab_size=VOCABULARY))


class NeedsMore(nn.Module):
    def forward(self, input_ids: Tensor, speaker: Tensor) -> Tensor:
        return input_ids


IMAGES = {"pixel_values": torch.zeros(2, 3, 16, 16)}
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
TIMMS_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}


@pytest.mark.parametrize(
    ("make", "batch", "words"),
    [
        (
            t5,
            token_batch(),
            r"\(T5For.*\) does not run on input_ids \(8, 6\).*add guide_decoder_input_ids .*get_encoder",
        ),
        (short, token_batch(length=6), r"\(8, 6\).*: IndexError: .* It has 4 positions: give it shorter rows"),
        (clip, IMAGES, r"\(CLIPModel\) does not run on pixel_values \(2, 3, 16, 16\): .* pass guide\.vision_model\."),
        (
            NeedsMore,
            token_batch(),
            r"TypeError: .*'speaker'\. If it needs other inputs, add them in columns",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 2, 1)).bfloat16(),
            IMAGES,
            r"Its weights are torch\.bfloat16 and its inputs torch\.float32: give both one type, as by \.float\(\)\.",
        ),
    ],
    ids=["encoder-decoder", "short", "clip", "another input", "another type"],
)
def test_a_guide_that_does_not_run_is_named_with_its_inputs_its_error_and_a_way_out(
    make: Any, batch: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        forward(make(), batch)


def test_what_is_out_of_memory_or_raised_by_the_reader_stays_as_it_is() -> None:
    class Full(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        forward(Full(), token_batch())

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embed(input_ids.mT)

    loss = GuidanceLoss(gpt2(), Turned(), GuidanceConfig(guide_layers=["embed"]))
    with pytest.raises(ValueError, match=r"^layer 'embed' gave shape"), loss.watch(token_batch()):
        pass


@pytest.mark.parametrize("part", ["vision_model", "text_model"])
def test_a_part_of_clip_guides_as_a_network_of_its_own(part: str) -> None:
    batch = IMAGES if part == "vision_model" else token_batch()
    assert forward(getattr(clip(), part), batch).last_hidden_state is not None


def test_only_an_error_of_what_reads_the_layers_is_from_here() -> None:
    for call, here in ((lambda: content_of({}), True), (lambda: int("x"), False)):
        with pytest.raises(ValueError) as raised:
            call()
        assert is_from_here(raised.value) is here
    assert not is_from_here(ValueError())  # never raised


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(image_size=16, patch_size=8, **VIT),
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMMS_VIT),
    ],
    ids=["transformers", "timm"],
)
def test_images_of_a_size_that_the_guide_does_not_take_are_an_error_that_names_both(config: Any) -> None:
    guide = load_guide(config)
    forward(guide, {"pixel_values": torch.zeros(2, 3, 16, 16)})
    words = rf"guide \({type(guide).__name__}\) does not run on pixel_values \(2, 3, 24, 24\): .*guide_pixel_values"
    with pytest.raises(ValueError, match=words):
        forward(guide, {"pixel_values": torch.zeros(2, 3, 24, 24)})
