"""ResNets without skips against torchvision's: values and initial weights."""

import math

import pytest
import torch
import torchvision
from builders import seeded
from torch import nn

from hf_guidance.targets import PlainResNetConfig, PlainResNetForImageClassification, PlainResNetModel


def images(size=8, batch=5):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_the_plain_resnet_is_torchvisions_without_its_skips(depth):
    reference = getattr(torchvision.models, f"resnet{depth}")(num_classes=7)
    model = PlainResNetForImageClassification(PlainResNetConfig.of_depth(depth, num_labels=7))
    ours = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    named = [(n, m) for n, m in reference.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    theirs = [m for n, m in named if "downsample" not in n]
    stem = reference.conv1, reference.bn1
    blocks = [block for stage in range(1, 5) for block in getattr(reference, f"layer{stage}")]
    ordered = [
        *stem,
        *(getattr(b, f"{k}{i}") for b in blocks for i in (1, 2, 3) for k in ("conv", "bn") if hasattr(b, f"{k}{i}")),
    ]
    ordered.append(reference.fc)
    assert len(ours) == len(theirs) == len(ordered)
    model.train(), reference.train()
    for mine, other in zip(ours, ordered, strict=True):
        mine.load_state_dict(other.state_dict())
    hidden = pixels = images(64, 4)
    hidden = expected = reference.maxpool(reference.bn1(reference.conv1(pixels)).relu())
    states = [expected]
    for block in blocks:
        for i in (1, 2, 3):
            if hasattr(block, f"conv{i}"):
                hidden = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(hidden)).relu()
        states.append(hidden)
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(states) == 1 + len(blocks)
    for mine, other in zip(outputs.hidden_states, states, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(outputs.logits, reference.fc(reference.avgpool(hidden).flatten(1)))


def test_initial_convolutions_are_he_et_als():
    model = seeded(lambda: PlainResNetModel(PlainResNetConfig.of_depth(18)), 0)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        assert conv.weight.detach().std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_images_of_any_size_end_in_a_thirty_second_of_it():
    model = PlainResNetModel(PlainResNetConfig(embedding_size=4, hidden_sizes=[8] * 4, depths=[1] * 4))
    assert model(images(64, 2)).last_hidden_state.shape == (2, 8, 2, 2)
    assert model(images(96, 2)).last_hidden_state.shape == (2, 8, 3, 3)
