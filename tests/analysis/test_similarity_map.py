"""Maps of all layers against all layers: their values, and what is left alone."""

import copy

import pytest
import torch
from builders import linear
from torch import nn

from hf_guidance import linear_cka
from hf_guidance.analysis.similarity_map import similarity_map
from hf_guidance.targets import FCNConfig, FCNForImageClassification


def networks(dropout=0.5):
    torch.manual_seed(0)
    config = FCNConfig(image_size=4, hidden_size=8, num_hidden_layers=3, hidden_dropout_prob=dropout)
    target = FCNForImageClassification(config).train()
    guide = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 5)).eval()
    return target, guide, {"pixel_values": torch.randn(12, 3, 4, 4), "labels": torch.zeros(12, dtype=torch.long)}


def test_every_pair_is_the_measure_of_the_two_layers_with_batch_statistics_and_without_dropout():
    target, guide, batch = networks()
    content = similarity_map(target, guide, linear(guide_layers=["Linear"]), batch)
    assert content["target_layers"] == [f"hidden_states.{i}" for i in (1, 2, 3)]
    assert content["guide_layers"] == ["1", "3"]
    assert content["pairs"] == ["hidden_states.1~1", "hidden_states.3~3"]
    reference = copy.deepcopy(target)
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    states = reference(**batch, output_hidden_states=True).hidden_states[1:]
    theirs = guide[1](guide[0](batch["pixel_values"]))
    for row, features in zip(content["similarity"], states, strict=True):
        assert row[0] == pytest.approx(float(linear_cka(features, theirs)), abs=1e-4)
        assert row[1] == pytest.approx(float(linear_cka(features, guide(batch["pixel_values"]))), abs=1e-4)


def test_weights_of_pairs_and_a_warm_up_change_no_value():
    target, guide, batch = networks()
    pairs = ["hidden_states.1~3", "hidden_states.3~1"]
    plain = similarity_map(target, guide, linear(layer_pairs=pairs), batch)
    config = linear(layer_pairs=["hidden_states.1~3@0.5", "hidden_states.3~1@0"], guidance_warmup_steps=9)
    assert similarity_map(target, guide, config, batch) == plain
    assert plain["pairs"] == pairs


def test_target_guide_and_randomness_are_left_as_they_are():
    target, guide, batch = networks()
    before = copy.deepcopy(target.state_dict())
    state = torch.get_rng_state()
    config = linear(guide_layers=["Linear"], guidance_schedule="linear", guidance_stop_step=5, prealign_steps=2)
    similarity_map(target, guide, config, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert target.training
    assert all(parameter.requires_grad for parameter in target.parameters())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert not any(module._forward_hooks for module in [*target.modules(), *guide.modules()])
