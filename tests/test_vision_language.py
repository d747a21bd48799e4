"""A vision-language model is guided in its text part by a text guide, and in its vision part by a vision guide."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import seeded
from torch import Tensor, nn
from trainers import make_trainer, train_logs
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hf_guidance import GuidanceConfig, GuidanceLoss

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = 39  # token that stands for a patch
TEXT = LlamaConfig(**SIZES, vocab_size=40, num_key_value_heads=2, max_position_embeddings=64)
VISION: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}
PARTS: dict[str, tuple[type[nn.Module], Any, dict[str, Any]]] = {
    "text": (LlamaModel, TEXT, {}),
    "vision": (ViTModel, ViTConfig(**VISION), {"target_layers": ["model.vision_tower.encoder.layers.*"]}),
}


def llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=TEXT,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    return seeded(lambda: LlavaForConditionalGeneration(config), 0)


def rows(length: int, count: int = 8) -> list[dict[str, Tensor]]:
    """Make images with captions of 6 to 9 tokens, padded to a length."""
    generator, found = torch.Generator().manual_seed(0), []
    for row in range(count):
        ids, valid = torch.randint(3, 38, (9,), generator=generator), 6 + row % 4
        ids[1:5] = IMAGE
        ids = torch.cat([ids[:valid], torch.zeros(length - valid, dtype=torch.int64)])
        mask = (torch.arange(length) < valid).long()
        image = torch.randn(3, 16, 16, generator=generator)
        labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
        found.append({"input_ids": ids, "attention_mask": mask, "pixel_values": image, "labels": labels})
    return found


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
def test_a_part_trains_guided_by_a_guide_of_its_kind(tmp_path: Path, part: str, axis: str) -> None:
    kind, config, layers = PARTS[part]
    target, guide = llava(), seeded(lambda: kind(config), 1)
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "sample_axis": axis, "guidance_weight": 2.0}
    trainer = make_trainer(tmp_path, target, guide, train_dataset=rows(9), **settings, **layers)
    before = [p.clone() for p in target.model.vision_tower.parameters()]
    trainer.train()
    logs = train_logs(trainer)
    assert len(logs) == 2
    assert all(math.isfinite(log["loss"]) for log in logs)
    assert any(not torch.equal(*pair) for pair in zip(before, target.model.vision_tower.parameters(), strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_padding_of_the_text_changes_nothing_and_is_no_padding_of_an_image(part: str) -> None:
    kind, config, layers = PARTS[part]
    target, guide, losses = llava().eval(), seeded(lambda: kind(config), 1), []
    loss = GuidanceLoss(target, guide, GuidanceConfig(measure="linear_cka", **layers))
    for length in (9, 14):
        batch = {name: torch.stack([row[name] for row in rows(length)]) for name in rows(length)[0]}
        with loss.watch(batch) as watched:
            target(**watched.inputs)
        losses.append(watched.loss)
    torch.testing.assert_close(*losses)
    if part == "vision":
        batch["pixel_values"] = batch["pixel_values"] + 0.1
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        with loss.watch(batch) as watched:
            target(**watched.inputs)
        assert not torch.allclose(losses[1], watched.loss), "images count"
