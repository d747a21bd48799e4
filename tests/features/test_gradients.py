"""Gradients through layers that are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_guidance.features.gradients import reaches_weights
from hf_guidance.features.reader import not_recomputed


def test_a_loss_reaches_weights_only_through_one_that_is_trained() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    assert reaches_weights(layer(x).sum())
    layer.requires_grad_(False)
    assert not reaches_weights(layer(x).sum())  # only the input has a gradient
    assert not reaches_weights(torch.zeros(()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_features_inside_a_checkpoint_are_read_once_and_refused_where_they_have_no_gradient(reentrant: bool) -> None:
    layer, seen = nn.Linear(3, 3), []
    reduce = not_recomputed(lambda name, features: seen.append(features.square().sum()))

    def run(x: Tensor) -> Tensor:
        features = layer(x)
        if not seen:
            reduce("layer", features)
        return features

    x = torch.randn(2, 3, requires_grad=True)
    if reentrant:
        with pytest.raises(ValueError, match=r"target layer 'layer' ran without gradients .* Set use_reentrant=False"):
            checkpoint(run, x, use_reentrant=True)
        return
    output = checkpoint(run, x, use_reentrant=False)
    (output.sum() + seen[0]).backward()
    expected = torch.autograd.grad(layer(x).sum() + layer(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)
