"""Bytes of a global batch are those of the features that are compared."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from builders import LENGTH, gpt2, linear, llama, module_outputs, token_batch
from costs import CONVS, fcn
from torch import nn

from hf_guidance.experiments.cost.communication import bytes_of_global_batch, compared_features


@pytest.mark.parametrize("sketch", [None, 4, 100])
def test_a_global_batch_sends_each_paired_layers_features_or_their_sketch(resnet, sketch):
    batch = {"pixel_values": torch.randn(12, 3, 32, 32), "labels": torch.zeros(12, dtype=torch.long)}
    convolutions = [name for name, module in resnet.named_modules() if isinstance(module, nn.Conv2d)]
    outputs = module_outputs(resnet, convolutions, batch["pixel_values"])
    widths = [8, 8, 8, *(output[0].numel() for output in outputs)]  # three target layers, all of them paired
    sent = 12 * 4 * sum(min(sketch or width, width) for width in widths)
    assert bytes_of_global_batch(fcn(), resnet, CONVS, nullcontext, batch, sketch) == sent
    assert bytes_of_global_batch(fcn(), resnet, CONVS, nullcontext, batch, 10**6) is None


def test_features_in_half_precision_are_half_the_bytes_unless_they_are_sketched(resnet):
    batch = {"pixel_values": torch.randn(12, 3, 32, 32), "labels": torch.zeros(12, dtype=torch.long)}
    sent = [
        bytes_of_global_batch(fcn(), resnet, CONVS, partial(torch.autocast, "cpu", torch.bfloat16, on), batch, None)
        for on in (False, True)
    ]
    of_target = 12 * 4 * 3 * 8  # which is not run in autocast here
    assert sent[1] - of_target == (sent[0] - of_target) / 2


def test_the_layers_compared_are_those_in_a_pair_as_samples_and_features():
    guidance = linear(layer_pairs=["hidden_states.2~hidden_states.1"])
    found = compared_features(gpt2(), llama(), guidance, nullcontext, token_batch(4))
    width = {layer.of_target: (layer.samples, layer.features) for layer in found}
    assert width == {True: (4, LENGTH * 8), False: (4, LENGTH * 12)}  # hidden sizes of the two
