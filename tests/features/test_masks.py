"""Masks that hold other numbers than 0 and 1, or what is added to attention scores."""

import pytest
import torch
from builders import gpt2, linear, llama, token_batch

from hf_guidance import GuidanceLoss
from hf_guidance.features import masks
from hf_guidance.features.masks import warn_if_added
from hf_guidance.features.rows import masks_of


def test_a_float_mask_is_read_as_what_it_holds_and_refused_if_that_is_neither() -> None:
    valid = torch.tensor([[True, True, False], [True, False, False]])
    for low in (float("-inf"), torch.finfo(torch.bfloat16).min, -1e4):
        added = torch.zeros(2, 3).masked_fill(~valid, low)
        assert torch.equal(masks_of({"attention_mask": added})["encoder"], valid)
    assert torch.equal(masks_of({"attention_mask": valid.float()})["encoder"], valid)
    assert masks_of({"attention_mask": torch.zeros(2, 3)})["encoder"].all()  # nothing is added, so nothing is padding
    assert masks_of({"decoder_attention_mask": torch.zeros(2, 3)})["decoder"].all()
    words = r"attention_mask holds \[.*1\.0\] …, expected 1 for valid positions and 0 for padding, or 0 and -inf"
    for other in (torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[-1.0, 0.0, 1.0]])):
        with pytest.raises(ValueError, match=words):
            masks_of({"attention_mask": other})


def test_an_additive_mask_which_the_target_reads_the_other_way_round_is_said_once(caplog) -> None:
    masks._say_that_it_is_swapped.cache_clear()
    mask = torch.tensor([[1, 1, 0]])
    for right in (mask, mask.bool(), mask.float(), mask[None, None].float() * -1e4, torch.zeros(0, 3)):
        warn_if_added({"attention_mask": right, "decoder_attention_mask": right})
    assert caplog.text == ""
    batch = token_batch()
    batch["attention_mask"] = torch.zeros(batch["input_ids"].shape)
    batch["attention_mask"][:, -1] = float("-inf")
    for guidance in (GuidanceLoss(gpt2(), llama(), linear()) for _ in range(2)):
        with guidance.watch(batch) as watched:
            guidance.target(input_ids=batch["input_ids"])
        assert watched.inputs["attention_mask"] is batch["attention_mask"]  # the target gets what Trainer would give it
    assert len(caplog.records) == 1
    words = "Pass 0 and 1, or an additive mask of four axes (batch, 1, length, length)."
    assert caplog.messages[0].startswith("attention_mask (batch, length) holds 0 and -inf, which guidance reads as")
    assert caplog.messages[0].endswith(words)
