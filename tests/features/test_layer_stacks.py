"""Stacks of layers that LayerDrop may skip, in networks of transformers."""

from __future__ import annotations

import pytest
from builders import gpt2
from torch import nn
from transformers import BartConfig, BartModel

from hf_guidance.features.layer_stacks import (
    in_words,
    rate_of,
    rate_setting,
    remedy,
    settings_of,
    stack_around,
    stack_of,
)


@pytest.fixture
def bart() -> nn.Module:
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 20, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    return BartModel(BartConfig(**sizes, **heads, encoder_layerdrop=0.25, decoder_layerdrop=0.5))


def test_the_rate_of_a_module_is_its_own(bart: nn.Module) -> None:
    assert [rate_of(module) for module in (bart.encoder, bart.decoder, gpt2())] == [0.25, 0.5, 0]
    assert rate_setting(gpt2()) is None
    assert rate_setting(bart.encoder) is not None


def test_settings_are_named_as_the_config_names_them(bart: nn.Module) -> None:
    assert settings_of(bart, bart.encoder) == {"encoder_layerdrop": 0.25}
    assert settings_of(bart, bart.decoder) == {"decoder_layerdrop": 0.5}


def test_a_stack_is_the_layers_that_make_the_hidden_states(bart: nn.Module) -> None:
    assert stack_of(bart, "encoder_hidden_states") == ("encoder", ["encoder.layers.0", "encoder.layers.1"])
    owner, layers = stack_of(bart, "hidden_states")
    assert (owner, len(layers)) == ("decoder", 3)
    assert stack_of(gpt2(), "hidden_states") is None


def test_around_a_module_stands_the_one_layer_that_may_be_skipped(bart: nn.Module) -> None:
    assert stack_around(bart, "decoder.layers.1.fc1") == ("decoder", ["decoder.layers.1"])
    assert stack_around(bart, "shared") is None


def test_words_are_code() -> None:
    assert in_words({"a": 0.5, "b": 0.25}) == "a=0.5, b=0.25"
    assert remedy(["decoder_layerdrop"]) == "build the target with decoder_layerdrop=0"
