"""Configuration of the fully connected targets: the sizes of the paper, errors, and the way through a file."""

import pytest
from transformers import AutoConfig

from hf_guidance.targets.configuration_fcn import FCNConfig


def test_named_sizes_are_the_papers():
    deep, wide = FCNConfig.deep(), FCNConfig.wide(image_size=32)
    assert (deep.num_hidden_layers, deep.hidden_size, deep.image_size) == (50, 2048, 224)
    assert (wide.num_hidden_layers, wide.hidden_size, wide.image_size) == (3, 8192, 32)


def test_a_saved_configuration_comes_back(tmp_path):
    config = FCNConfig(image_size=12, num_channels=1, hidden_size=7, hidden_dropout_prob=0.25, batch_norm=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FCNConfig
    assert (loaded.image_size, loaded.num_channels, loaded.hidden_size) == (12, 1, 7)
    assert (loaded.hidden_dropout_prob, loaded.batch_norm, loaded.num_hidden_layers) == (0.25, False, 50)


@pytest.mark.parametrize("name", ["image_size", "num_channels", "hidden_size", "num_hidden_layers"])
def test_a_size_of_nothing_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        FCNConfig(**{name: 0})


@pytest.mark.parametrize("probability", [1.0, -0.1])
def test_a_dropout_that_is_no_probability_is_named(probability):
    with pytest.raises(ValueError, match=rf"a probability in \[0, 1\), got {probability}"):
        FCNConfig(hidden_dropout_prob=probability)
