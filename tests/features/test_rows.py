"""Rows of a batch: their content, and which of their positions are valid."""

import pytest
import torch

from hf_guidance.features.rows import choose_rows, content_of, masks_of, mix, take_rows


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


def ids(rows: int = 32, length: int = 5) -> torch.Tensor:
    return torch.randint(1000, (rows, length), generator=torch.Generator().manual_seed(0))


def test_rows_are_chosen_by_content_and_seed_whatever_their_order_and_padding() -> None:
    content = ids()
    mask = torch.arange(5) < torch.randint(1, 6, (32, 1), generator=torch.Generator().manual_seed(1))
    chosen = choose_rows({"input_ids": content, "attention_mask": mask}, 7, seed=3)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 7
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    longer = torch.full((32, 9), 5)
    longer[:, 4:] = torch.where(mask, content, 6)  # other junk, and on both sides
    wider = torch.nn.functional.pad(mask, (4, 0))
    permuted = choose_rows({"input_ids": longer[order], "attention_mask": wider[order]}, 7, seed=3)
    assert sorted(order[permuted].tolist()) == chosen.tolist()


def test_each_step_chooses_other_rows_and_in_the_long_run_all_alike() -> None:
    batch = {"input_ids": ids()}
    counts = torch.zeros(32)
    for seed in range(1000):
        counts[choose_rows(batch, 8, seed)] += 1
    assert (counts - 250).abs().max() < 75  # 5.5 standard errors of 13.7


def test_equal_rows_do_not_change_the_number_and_a_small_batch_is_taken_whole() -> None:
    same = {"input_ids": torch.ones(6, 4, dtype=torch.int64)}
    assert choose_rows(same, 4, seed=0).tolist() == [0, 1, 2, 3]
    assert choose_rows(same, 6, seed=0) is None
    assert choose_rows(same, 9, seed=0) is None


def test_taken_rows_are_those_of_every_column_that_has_rows() -> None:
    batch = {"input_ids": ids(3), "id": torch.arange(3), "scale": torch.tensor(2.0), "name": "x"}
    taken = take_rows(batch, torch.tensor([2, 0]))
    assert torch.equal(taken["input_ids"], batch["input_ids"][[2, 0]])
    assert taken["id"].tolist() == [2, 0]
    assert (taken["scale"], taken["name"]) == (batch["scale"], "x")
