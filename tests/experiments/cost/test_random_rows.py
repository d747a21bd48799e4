"""Random rows have the sizes that are asked for, and the same seed gives the same rows."""

import torch

from hf_guidance.experiments.cost.random_rows import random_images, random_tokens


def test_ids_of_samples_reach_the_guided_trainer_alone():
    rows = random_images(4, 8, 2)
    assert "id" not in rows[1]
    assert rows.with_ids("id")[1]["id"] == 1


def test_rows_are_of_the_sizes_asked_for_and_of_their_seed():
    rows = random_images(4, 8, 2, guide_size=6, seed=3)
    assert len(rows) == 4
    assert {name: tuple(value.shape) for name, value in rows[3].items()} == {
        "pixel_values": (3, 8, 8),
        "guide_pixel_values": (3, 6, 6),
        "labels": (),
    }
    assert "guide_pixel_values" not in random_images(4, 8, 2, guide_size=8)[0]
    assert torch.equal(rows[1]["pixel_values"], random_images(4, 8, 2, seed=3)[1]["pixel_values"])
    assert not torch.equal(rows[1]["pixel_values"], random_images(4, 8, 2, seed=4)[1]["pixel_values"])
    tokens = random_tokens(5, 7, 11)[4]
    assert torch.equal(tokens["input_ids"], tokens["labels"])
    assert tokens["input_ids"].shape == (7,)
    assert max(int(row["input_ids"].max()) for row in (random_tokens(50, 7, 11)[i] for i in range(50))) == 10
