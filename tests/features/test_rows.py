"""Rows of a batch: their content, and which of their positions are valid."""

import pytest
import torch

from hf_guidance.features.rows import content_of, masks_of, mix


def test_the_content_is_the_main_input_or_the_first_tensor_with_two_axes() -> None:
    ids, other = torch.zeros(2, 3), torch.ones(2, 4)
    assert content_of({"labels": other, "input_ids": ids}) is ids
    assert content_of({"id": torch.arange(2), "values": other}) is other
    with pytest.raises(ValueError, match=r"no tensor with a sample axis and a second axis; it has \['id'\]"):
        content_of({"id": torch.arange(2)})


def test_masks_are_those_of_encoder_and_decoder_as_far_as_they_are_known() -> None:
    encoder, labels = torch.tensor([[1, 1, 0]]), torch.tensor([[5, -100]])
    masks = masks_of({"attention_mask": encoder, "decoder_input_ids": torch.zeros(1, 2).long(), "labels": labels})
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "encoder": [[True, True, False]],
        "decoder": [[True, False]],
    }
    assert masks_of({"decoder_input_ids": torch.zeros(1, 2).long()})["decoder"].all()
    assert masks_of({"decoder_attention_mask": encoder, "labels": labels})["decoder"].tolist() == [[True, True, False]]
    assert masks_of({"attention_mask": torch.ones(1, 1, 3, 3)}) == {}  # a mask of pairs of positions, of no padding


def test_mixing_scatters_neighbours_over_all_bits_but_the_signs_and_loses_none() -> None:
    mixed = mix(torch.arange(4096))
    assert len(mixed.unique()) == 4096
    bits = (mixed[:, None] >> torch.arange(63)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.05  # six standard errors of 0.008
