"""Gradients through layers that are read."""

from __future__ import annotations

import torch
from torch import nn

from hf_guidance.features.gradients import reaches_weights


def test_a_loss_reaches_weights_only_through_one_that_is_trained() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    assert reaches_weights(layer(x).sum())
    layer.requires_grad_(False)
    assert not reaches_weights(layer(x).sum())  # only the input has a gradient
    assert not reaches_weights(torch.zeros(()))
