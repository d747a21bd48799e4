"""Modules of a network are found by name, glob and type, and described from the outside in."""

from __future__ import annotations

import pytest
from builders import gpt2, llama, token_batch
from torch import nn

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.modules import describe_modules, find_modules
from hf_guidance.features.reader import base_model_of


def test_the_base_model_of_a_network_without_adapters_is_the_network() -> None:
    model = gpt2()
    assert base_model_of(model) is model


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("transformer.h.1", ["transformer.h.1"]),
        ("transformer.h.*", ["transformer.h.0", "transformer.h.1"]),
        ("transformer.h.?.mlp", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        ("**.mlp", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        ("**mlp.c_fc", ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]),
        ("GPT2Block", ["transformer.h.0", "transformer.h.1"]),
        ("Embedding", ["transformer.wte", "transformer.wpe"]),
        ("GradientCheckpointingLayer", ["transformer.h.0", "transformer.h.1"]),  # a base of GPT2Block
    ],
)
def test_modules_are_found_by_name_glob_and_type_in_order(pattern: str, found: list[str]) -> None:
    model = gpt2()
    modules = find_modules(model, pattern)
    assert list(modules) == found
    assert all(module is model.get_submodule(name) for name, module in modules.items())


@pytest.mark.parametrize("name", ["h.1", "h.*", "h.?.mlp", "wte"])
def test_names_may_be_those_of_the_network_with_its_head_or_without(name: str) -> None:
    model = gpt2()
    headed, body = find_modules(model, name), find_modules(model.transformer, f"transformer.{name}")
    assert list(headed) == [f"transformer.{found}" for found in body]
    assert list(headed.values()) == list(body.values())


def test_pairs_of_such_names_are_those_of_the_networks() -> None:
    config = GuidanceConfig(measure="linear_cka", layer_pairs=["h.1~model.layers.0@0.5", "transformer.h.0~layers.1"])
    target, guide = gpt2(), llama()
    loss = GuidanceLoss(target, guide, config)
    with loss.watch(token_batch()) as watched:
        target(**watched.inputs)
    assert loss.pairs == [("transformer.h.1", "layers.0"), ("transformer.h.0", "layers.1")]
    values = watched.similarities["linear_cka"]
    assert list(values) == ["transformer.h.1~layers.0", "transformer.h.0~layers.1"]
    assert float(watched.loss) == pytest.approx(
        0.5 * (1 - float(values["transformer.h.1~layers.0"])) + 1 - float(values["transformer.h.0~layers.1"])
    )


def test_a_dot_and_a_bracket_in_a_pattern_are_themselves() -> None:
    model = nn.ModuleDict({"a1": nn.Linear(1, 1), "a": nn.ModuleDict({"1": nn.Linear(1, 1)})})
    assert list(find_modules(model, "a.*")) == ["a.1"]
    with pytest.raises(ValueError, match="not found"):
        find_modules(model, "a[1]*")


def test_modules_are_described_from_the_outside_in_and_cut_short() -> None:
    words = describe_modules(gpt2())
    assert words.startswith("transformer (GPT2Model), lm_head (Linear), transformer.wte (Embedding), ")
    assert words.count("(") == 8
    assert "2 GPT2Block (transformer.h.0 … transformer.h.1)" in words
    assert words.endswith("more kinds")


@pytest.mark.parametrize("pattern", ["*", "**", "*.*", "?"])
def test_a_glob_without_a_word_names_the_blocks_instead(pattern):
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 1)})
    with pytest.raises(ValueError, match=r"guide layer .* stands for modules of any name.*as 'blocks\.\*', or use hid"):
        find_modules(network, pattern, "guide")
