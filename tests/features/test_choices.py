"""The choice of rows to compare: by their content and a seed, whatever their order and padding."""

from __future__ import annotations

import torch

from hf_guidance.features.choices import choose_rows


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


def test_of_images_the_same_are_chosen_in_any_order() -> None:
    images = torch.rand(64, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    chosen, permuted = choose_rows({"pixel_values": images}, 9, 3), choose_rows({"pixel_values": images[order]}, 9, 3)
    assert sorted(order[permuted].tolist()) == chosen.tolist()
