"""Networks by name, and an example of their input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gpt2, t5
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTMAEConfig

from hf_guidance.commands.networks import (
    check_colours,
    check_same_kind,
    example_for,
    head_for,
    kind_of,
    load,
    load_target,
    pixels_of,
)
from hf_guidance.guide.forward import forward


def test_a_network_is_loaded_with_its_weights_or_with_those_of_a_seed(tmp_path: Path) -> None:
    network = gpt2()
    network.save_pretrained(tmp_path)
    own, drawn, again, other = (load(str(tmp_path), seed).wte.weight for seed in (None, 3, 3, 4))
    assert torch.equal(own, network.transformer.wte.weight)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


@pytest.mark.parametrize("name", ["text", "encoder-decoder", "timm/resnet18"])
def test_a_network_runs_on_its_example(name: str) -> None:
    network = {"text": gpt2, "encoder-decoder": t5}.get(name, lambda: load(name, 0))()
    example = example_for(network, name, 32)
    assert kind_of(network, name) == ("images" if "timm" in name else "text")
    assert all(len(value) == 2 for value in example.values())
    forward(network, example)


def test_images_have_the_size_that_is_asked_for_or_that_the_network_has() -> None:
    assert pixels_of("timm/resnet18", 0, None).size == 64
    assert pixels_of("timm/resnet18", 0, 48).size == 48
    assert pixels_of("timm/vit_tiny_patch16_224", 0, None).size == 224


def test_what_takes_neither_images_nor_text_is_named() -> None:
    class Sound(nn.Module):
        def forward(self, input_values: Tensor) -> Tensor:
            return input_values

    with pytest.raises(ValueError, match="ear takes input_values; expected pixel_values or input_ids"):
        kind_of(Sound(), "ear")


def test_a_target_has_the_head_of_its_task_and_is_trained(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "gpt2")
    t5().save_pretrained(tmp_path / "t5")
    names = [head_for(name).__name__ for name in (str(tmp_path / "gpt2"), str(tmp_path / "t5"), "timm/resnet10t")]
    assert names == ["AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"]
    found = load_target(str(tmp_path / "gpt2"), None, head_for(str(tmp_path / "gpt2")))
    assert all(parameter.requires_grad for parameter in found.parameters())
    one, other = (load_target("timm/resnet10t", 3, head_for("timm/resnet10t"), classes=7) for _ in range(2))
    assert one.timm_model.num_classes == 7
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    ViTMAEConfig().save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="has no head for language modelling or the classification of images"):
        head_for(str(tmp_path / "mae"))


def test_networks_of_other_data_or_colours_are_refused() -> None:
    check_same_kind(("a", "b"), ("text", "text"))
    with pytest.raises(ValueError, match="a takes text and b images: two networks need the same data"):
        check_same_kind(("a", "b"), ("text", "images"))
    check_colours(gpt2(), "a")
    with pytest.raises(ValueError, match="a takes images of 1 channels"):
        check_colours(ResNetModel(ResNetConfig(num_channels=1, depths=[1], hidden_sizes=[8], embedding_size=8)), "a")
