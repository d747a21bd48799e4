"""Explanations of samples that are too few, or others than those of the other network."""

from __future__ import annotations

import peft
import pytest
import torch
from builders import gpt2, linear, llama, t5
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_guidance import GuidanceLoss
from hf_guidance.features.mismatches import why_too_few


def message_of(target: nn.Module, guide: nn.Module, batch: dict[str, Tensor], axis: str) -> str:
    config = linear(sample_axis=axis, guide_shares_tokenizer=True)
    loss = GuidanceLoss(target, guide, config)
    with pytest.raises(ValueError, match="need the same positions") as raised, loss.watch(batch) as watched:
        target(**watched.inputs)
    return str(raised.value)


@pytest.mark.parametrize("axis", ["token", "within"])
def test_where_positions_differ_the_cause_that_is_known_is_named(axis: str) -> None:
    ids = torch.randint(17, (8, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :4].contiguous()}
    said = message_of(t5(), llama(), batch, axis)
    assert "Those of the target are its decoder's, and those of the other network its input's" in said
    assert "target_layers=['encoder_hidden_states']), or use sample_axis='sequence'" in said
    assert "class token" not in said
    said = message_of(gpt2(), llama(), {"input_ids": ids, "guide_input_ids": ids[:, :5]}, axis)
    assert "The target gets rows of 6 token ids and the guide of 5, as of two tokenizers: use sample_axis=" in said
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    said = message_of(peft.get_peft_model(gpt2(), config), llama(), {"input_ids": ids}, axis)
    assert "puts 3 virtual tokens in front of each row, which the guide does not have" in said


def test_a_class_token_is_proposed_only_where_one_position_is_missing() -> None:
    images = {"pixel_values": torch.rand(8, 3, 16, 16)}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vit, other = (ViTModel(ViTConfig(**sizes, image_size=16, patch_size=size)) for size in (4, 8))
    assert message_of(vit, other, images, "token").endswith("Use sample_axis='sequence'.")
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=3))
    assert message_of(vit, resnet, images, "token").endswith("skip_first_positions=1 if one of them has a class token.")


def test_too_few_samples_are_counted_in_the_words_of_their_axis() -> None:
    begin = "ridge needs at least 3 samples, and the batch has "
    assert why_too_few("token", "ridge", 3, 2) == begin + "2 valid tokens: raise per_device_train_batch_size"
    one = begin + "1 row: raise per_device_train_batch_size, or set dataloader_drop_last=True if it is an epoch's last"
    assert why_too_few("sequence", "ridge", 3, 1) == one + " batch"
    packed = begin + "2 rows, into which documents are packed: set sample_axis='token'"
    assert why_too_few("sequence", "ridge", 3, 2, packed=True) == packed
    assert "no row of the batch has so many: set sample_axis='token'" in why_too_few("within", "ridge", 3, 0)
