"""The vision targets under the names that the recipes use."""

import pytest
import torch

from hf_guidance.targets import FCNForImageClassification, PlainResNetForImageClassification
from hf_guidance.targets.vision import VISION_TARGETS, vision_target


@pytest.mark.parametrize("name", VISION_TARGETS)
def test_every_name_builds_a_classifier_of_the_images_and_classes_it_is_given(name):
    width = {} if name.startswith("resnet") else {"width": 6}
    network = vision_target(name, 32, depth=18 if not width else 3, num_labels=5, **width).eval()
    assert network(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 5)


@pytest.mark.parametrize(("name", "width", "blocks"), [("deep_fcn", 2048, 50), ("wide_fcn", 8192, 3)])
def test_what_is_left_out_is_the_papers(name, width, blocks):
    with torch.device("meta"):
        network = vision_target(name, 32)
    assert isinstance(network, FCNForImageClassification)
    assert (network.config.hidden_size, network.config.num_hidden_layers) == (width, blocks)
    assert network.config.hidden_dropout_prob == 0


def test_the_resnet_without_skips_has_fifty_layers():
    with torch.device("meta"):
        network = vision_target("resnet50_without_skips", 32)
    assert isinstance(network, PlainResNetForImageClassification)
    assert sum(isinstance(module, torch.nn.Conv2d) for module in network.modules()) == 49  # and the classifier


def test_the_width_of_a_resnet_is_that_of_its_stem_which_the_others_follow():
    config = vision_target("resnet50_without_skips", 32, width=16).config
    assert (config.embedding_size, config.hidden_sizes) == (16, [64, 128, 256, 512])
    assert vision_target("resnet50_without_skips", 32, width=4, depth=18).config.hidden_sizes == [4, 8, 16, 32]


def test_width_depth_and_dropout_of_an_fcn_are_taken():
    config = vision_target("wide_fcn", 8, width=5, depth=2, dropout=0.5).config
    assert (config.hidden_size, config.num_hidden_layers, config.hidden_dropout_prob) == (5, 2, 0.5)
