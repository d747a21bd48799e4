"""Rows of a batch: their content, and which of their positions are valid."""

import pytest
import torch

from hf_guidance.features.rows import content_of, hashes_of, masks_of, mix


def test_the_content_is_the_main_input_or_the_first_tensor_with_two_axes_or_else_with_one() -> None:
    ids, other = torch.zeros(2, 3), torch.ones(2, 4)
    assert content_of({"labels": other, "input_ids": ids}) is ids
    assert content_of({"id": torch.arange(2), "values": other}) is other
    user = torch.arange(2)
    assert content_of({"name": "x", "scale": torch.tensor(1.0), "user": user, "item": user + 1}) is user
    words = r"no tensor with a sample axis; it has \['name', 'scale'\]\. Guidance compares rows: let the data collator"
    with pytest.raises(ValueError, match=words):
        content_of({"name": "x", "scale": torch.tensor(1.0)})


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


def test_a_decoder_fed_by_embeddings_or_by_several_codes_has_a_mask_too() -> None:
    embedded = {"decoder_inputs_embeds": torch.zeros(2, 3, 8)}
    assert masks_of(embedded)["decoder"].tolist() == [[True] * 3] * 2
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    assert masks_of({**embedded, "labels": labels})["decoder"].tolist() == [[True, True, False], [True] * 3]
    codes = {"decoder_input_ids": torch.zeros(2, 3).long(), "labels": torch.zeros(2, 3, 4)}
    assert masks_of(codes)["decoder"].shape == (2, 3)


def test_an_integer_mask_of_what_is_added_is_read_as_that() -> None:
    added = torch.tensor([[0, 0, -10000]])
    assert masks_of({"attention_mask": added})["encoder"].tolist() == [[True, True, False]]
    assert masks_of({"attention_mask": 2 - torch.tensor([[1, 0, 2]])})["encoder"].tolist() == [[True, True, False]]


def test_mixing_scatters_neighbours_over_all_bits_but_the_signs_and_loses_none() -> None:
    mixed = mix(torch.arange(4096))
    assert len(mixed.unique()) == 4096
    bits = (mixed[:, None] >> torch.arange(63)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.05  # six standard errors of 0.008


def test_images_are_told_apart_by_a_sample_of_their_pixels() -> None:
    images = torch.rand(64, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert len(hashes_of(images).unique()) == 64
    assert torch.equal(hashes_of(images), hashes_of(images.contiguous(memory_format=torch.channels_last)))
