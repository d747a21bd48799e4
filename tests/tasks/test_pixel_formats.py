"""How networks want their images, read from what they were saved with."""

import pytest
import timm
import torch
from transformers import CLIPImageProcessor, GPT2Config, TimmWrapperConfig, ViTConfig, ViTImageProcessor

from hf_guidance import load_guide
from hf_guidance.tasks.image_decoding import PixelFormat
from hf_guidance.tasks.pixel_formats import check_sees, check_takes, pixel_format_of


def test_an_untrained_network_takes_the_targets_size_unless_it_is_made_for_one():
    assert pixel_format_of("timm/resnet18", 28, trained=False) == PixelFormat(28)
    assert pixel_format_of("timm/resnet18.a1_in1k", 28, trained=False, given=64) == PixelFormat(64)
    assert pixel_format_of("timm/vit_tiny_patch16_224", 28, trained=False).size == 224


def test_a_trained_one_takes_what_its_image_processor_says(tmp_path):
    ViTConfig(image_size=32, patch_size=8).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3]
    ).save_pretrained(tmp_path / "vit")
    expected = PixelFormat(32, (0.1, 0.2, 0.3), (1, 2, 3))
    assert pixel_format_of(str(tmp_path / "vit"), 28, trained=True) == expected
    assert pixel_format_of(str(tmp_path / "vit"), 28, trained=False) == PixelFormat(32)
    CLIPImageProcessor(size={"shortest_edge": 73}, crop_size=64).save_pretrained(tmp_path / "vit")
    assert pixel_format_of(str(tmp_path / "vit"), 28, trained=True).size == 64
    defaults = timm.get_pretrained_cfg("resnet18.a1_in1k")
    config = TimmWrapperConfig(architecture="resnet18", pretrained_cfg=defaults.to_dict())
    config.save_pretrained(tmp_path / "timm")
    assert pixel_format_of(str(tmp_path / "timm"), 28, trained=True) == PixelFormat(224, defaults.mean, defaults.std)


def test_a_trained_network_without_an_image_processor_is_named(tmp_path):
    ViTConfig(image_size=32, patch_size=8).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"the guide .*vit comes without an image processor .*save the processor besi"):
        pixel_format_of(str(tmp_path / "vit"), 28, trained=True)


class Bare(torch.nn.Module):
    def forward(self, pixel_values):
        if pixel_values.shape[-1] != 64:
            raise AssertionError


def test_a_network_that_refuses_a_size_without_a_word_is_named_too():
    with pytest.raises(ValueError, match=r"the guide bare cannot take images of 28 × 28 pixels \(AssertionError\)"):
        check_takes(Bare(), PixelFormat(28), "bare")


def test_a_network_that_cannot_take_a_size_is_named(tmp_path):
    ViTConfig(image_size=32, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path / "vit"
    )
    guide = load_guide(tmp_path / "vit", untrained=True)
    check_takes(guide, PixelFormat(32), "vit")
    with pytest.raises(ValueError, match=r"the guide vit cannot take images of 28 × 28 pixels \(.*guide_image_size"):
        check_takes(guide, PixelFormat(28), "vit")


def test_a_network_of_words_is_named_as_one():
    check_sees(Bare(), "bare")
    guide = load_guide(GPT2Config(n_embd=8, n_layer=1, n_head=1), untrained=True)
    with pytest.raises(ValueError, match=r"the guide gpt2 \(GPT2Model\) takes input_ids, .* no pixel_values: name"):
        check_sees(guide, "gpt2")
