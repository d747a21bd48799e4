"""Networks by name, and an example of their input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gpt2, t5
from torch import Tensor, nn

from hf_guidance.commands.networks import example_for, kind_of, load, pixels_of
from hf_guidance.guide.calling import forward


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
