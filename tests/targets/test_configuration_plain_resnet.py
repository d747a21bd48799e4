"""Configuration of the ResNets without skips: depths, errors, and the way through a file."""

import pytest
from transformers import AutoConfig

from hf_guidance.targets.configuration_plain_resnet import PlainResNetConfig


@pytest.mark.parametrize(
    ("depth", "block_type", "blocks", "last"),
    [(18, "basic", [2, 2, 2, 2], 512), (34, "basic", [3, 4, 6, 3], 512), (50, "bottleneck", [3, 4, 6, 3], 2048)],
)
def test_depths_are_those_of_he_et_al(depth, block_type, blocks, last):
    config = PlainResNetConfig.of_depth(depth, num_labels=7)
    assert (config.block_type, config.depths, config.num_labels) == (block_type, blocks, 7)
    assert config.hidden_sizes == [last // 8, last // 4, last // 2, last]
    convolutions = {"basic": 2, "bottleneck": 3}[block_type] * sum(config.depths)
    assert convolutions + 2 == depth  # and the stem and the classifier


def test_the_default_is_the_papers_fifty_layers():
    assert PlainResNetConfig().to_dict() == PlainResNetConfig.of_depth(50).to_dict()


def test_a_saved_configuration_comes_back(tmp_path):
    PlainResNetConfig(embedding_size=4, hidden_sizes=[6, 8], depths=[1, 2], block_type="basic").save_pretrained(
        tmp_path
    )
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PlainResNetConfig
    assert (loaded.embedding_size, loaded.hidden_sizes, loaded.depths) == (4, [6, 8], [1, 2])
    assert loaded.block_type == "basic"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlainResNetConfig(block_type="wide"), "unknown block_type 'wide'; choose one of basic, bottleneck"),
        (lambda: PlainResNetConfig(depths=[3]), r"hidden_sizes and depths name each stage: got .* and \[3\]"),
        (lambda: PlainResNetConfig(hidden_sizes=[6, 8, 8, 8]), "multiples of 4"),
        (lambda: PlainResNetConfig(embedding_size=0), "sizes must be at least 1, got .*, 0"),
        (lambda: PlainResNetConfig.of_depth(101), "depth must be one of 18, 34, 50, got 101"),
    ],
)
def test_bad_sizes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
