"""Fully connected targets against plain numpy: values, dropout, initial weights, errors."""

import numpy as np
import pytest
import torch
from builders import seeded
from torch import nn

from hf_guidance.targets import (
    FCNConfig,
    FCNForImageClassification,
    FCNModel,
)

torch.set_num_threads(1)


SMALL = FCNConfig(image_size=8, hidden_size=6, num_hidden_layers=4, num_labels=3)


def images(size=8, batch=5):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_fcn_is_linear_norm_relu_on_flattened_pixels():
    model, pixels = seeded(lambda: FCNForImageClassification(SMALL), 0).eval(), images()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected = [pixels.double().numpy().reshape(5, -1)]
    for i in range(4):
        part = {name.split(f"blocks.{i}.")[1]: v for name, v in state.items() if f"blocks.{i}." in name}
        z = expected[-1] @ part["linear.weight"].T + part["linear.bias"]
        z = (z - part["norm.running_mean"]) / np.sqrt(part["norm.running_var"] + 1e-5)
        expected.append(np.maximum(z * part["norm.weight"] + part["norm.bias"], 0))
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    for ours, theirs in zip(outputs.hidden_states, expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=1e-5)
    logits = expected[-1] @ state["classifier.weight"].T + state["classifier.bias"]
    np.testing.assert_allclose(outputs.logits.detach().numpy(), logits, atol=1e-5)


def test_dropout_is_behind_the_relu_and_batch_norm_can_be_left_out():
    config = FCNConfig(image_size=4, hidden_size=2000, num_hidden_layers=1, hidden_dropout_prob=0.25, batch_norm=False)
    model = FCNModel(config).train()
    hidden = model(images(4)).last_hidden_state
    zero = (model.eval()(images(4)).last_hidden_state > 0) & (hidden == 0)
    assert zero.sum() / (zero | (hidden > 0)).sum() == pytest.approx(0.25, abs=0.03)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


def test_initial_weights_are_torchs_own():
    model = seeded(lambda: FCNModel(FCNConfig(image_size=16, hidden_size=300, num_hidden_layers=2)), 0)
    linear = model.blocks[1].linear
    assert linear.weight.detach().abs().max() == pytest.approx(300**-0.5, rel=1e-3)
    assert linear.weight.detach().std() == pytest.approx((3 * 300) ** -0.5, rel=0.02)


def test_images_of_another_size_are_named():
    with pytest.raises(ValueError, match=r"shape \(5, 3, 9, 9\); expected \(batch, 3, 8, 8\)"):
        FCNModel(SMALL)(images(9))
