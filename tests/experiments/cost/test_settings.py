"""Settings of a measurement are read, and their networks and rows are of their sizes."""

import pytest
from builders import arguments
from costs import CONVS

from hf_guidance.experiments.cost.measuring import Plan, measure_cost
from hf_guidance.experiments.cost.settings import Networks, Setting, parse_rows


def test_rows_are_read_and_a_wrong_one_is_named():
    assert parse_rows(["64/112/1024"]) == [Setting(64, 112, 1024)]
    assert Setting(64, 112, 1024).name == "64/112/1024"
    for wrong in ("64/112", "64/112/wide", "0/32/8"):
        with pytest.raises(ValueError, match=f"--rows {wrong}: expected batch/image/width, such as 64/64/512"):
            parse_rows([wrong])


def test_a_guide_of_another_image_size_gets_images_of_its_own(tmp_path, resnet):
    networks = Networks("deep_fcn", "timm/resnet10t", depth=2, guide_image_size=48)
    target, rows = networks.build(Setting(3, 32, 8), resnet, batches=2, seed=0)
    assert len(rows) == 6
    assert rows[0]["pixel_values"].shape == (3, 32, 32)
    assert rows[0]["guide_pixel_values"].shape == (3, 48, 48)
    assert (target.config.hidden_size, target.config.num_hidden_layers) == (8, 2)
    plan = Plan(rounds=1, steps=1)
    found = measure_cost(target, resnet, rows, arguments(tmp_path, per_device_train_batch_size=3), CONVS, plan)
    assert found["guide_forwards"] == 1
