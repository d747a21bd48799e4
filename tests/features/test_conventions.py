"""Where a network puts channels and frames: told by its weights, by a square map, or by the user."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.samples import Samples

SOUND: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "conv_dim": (4, 4),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "layerdrop": 0,
}


class Maps(nn.Module):
    """A network whose module gives a map of these shapes, with weights of so many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, channels, 1)


@pytest.mark.parametrize(
    ("shape", "channels", "first"),
    [
        ((2, 6, 4, 5), 6, True),
        ((2, 4, 5, 6), 6, False),
        ((2, 6, 4, 4), 6, True),
        ((2, 4, 6, 6), 6, None),  # as of a block that joins its inputs
        ((2, 6, 6, 4), 6, None),
        ((2, 7, 4, 4), 6, True),  # as of an activation without weights in sight
        ((2, 4, 4, 7), 6, False),
        ((2, 6, 5, 6), 6, None),
        ((2, 6, 6, 6), 6, None),
        ((2, 3, 4, 5), 6, None),
    ],
)
def test_channels_are_where_the_weights_have_as_many_or_else_beside_a_square(
    shape: tuple[int, ...], channels: int, first: bool | None
) -> None:
    features = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    network = Maps(channels)
    layouts = {True: features.flatten(2).mT, False: features.flatten(1, 2)}
    conventions = Conventions(network, {"layer": network.layer})
    if first is None:
        with pytest.raises(ValueError, match="not certain: set feature_layout='channels_first' or 'channels_last'"):
            conventions.places("layer", features)
        for layout, expected in zip(("channels_first", "channels_last"), layouts.values(), strict=True):
            named = Conventions(network, {"layer": network.layer}, layout)
            assert torch.equal(named.places("layer", features), expected)
    else:
        assert torch.equal(conventions.places("layer", features), layouts[first])


def test_a_place_of_torchvisions_swin_is_a_sample_with_all_of_its_channels() -> None:
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3, stochastic_depth_prob=0)
    guide = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3)
    for axis in ("token", "within"):
        config = GuidanceConfig(sample_axis=axis, target_layers=["features.1"], guide_layers=["features.1"])
        loss = GuidanceLoss(swin, guide, config)
        loss.keeps_layers = True
        with loss.watch({"pixel_values": torch.randn(6, 3, 16, 16)}) as watched:
            swin(watched.inputs["pixel_values"])
        assert watched.layers is not None
        (layer,) = watched.layers[0]["features.1"]
        assert layer.width == 8
        assert layer.samples == {"token": 6 * 16, "within": 16}[axis]


def test_a_convolution_over_a_sequence_has_its_positions_last_and_they_come_first() -> None:
    conv = nn.Conv1d(3, 6, 1)
    network = nn.Sequential(conv, nn.ReLU())
    conventions = Conventions(network, {"0": conv, "1": network[1]})
    features = torch.randn(2, 6, 6)
    samples = Samples({"x": torch.randn(2, 3, 6)}, conventions=conventions)
    assert torch.equal(samples.prepared("0", features)[0], features.mT)
    assert torch.equal(samples.prepared("1", features)[0], features)


@pytest.mark.parametrize("lengths", [[400], [400, 80, 161, 320]])
def test_frames_are_those_that_the_network_computes(lengths: list[int]) -> None:
    network = Wav2Vec2Model(Wav2Vec2Config(**SOUND)).eval()
    frames = Conventions(network, {}).to_frames(torch.tensor(lengths))
    assert frames is not None
    for length, expected in zip(lengths, frames.tolist(), strict=True):
        assert network(torch.randn(1, length)).last_hidden_state.shape[1] == expected
    assert Conventions(nn.Linear(2, 2), {}).to_frames(torch.tensor(lengths)) is None


@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
def test_padded_sound_is_no_part_of_a_similarity(axis: str) -> None:
    torch.manual_seed(0)
    target, guide = (Wav2Vec2Model(Wav2Vec2Config(**SOUND)).eval() for _ in range(2))
    lengths, values = torch.tensor([128, 64, 96, 128, 80, 72]), []
    mask, sound = torch.arange(128) < lengths[:, None], torch.randn(6, 128)
    loss = GuidanceLoss(target, guide, GuidanceConfig(measure="linear_cka", sample_axis=axis))
    for more in (0, 48):
        batch: dict[str, Tensor] = {
            "input_values": torch.cat([torch.where(mask, sound, 0), torch.zeros(6, more)], 1),
            "attention_mask": torch.cat([mask, torch.zeros(6, more, dtype=torch.bool)], 1).long(),
        }
        with loss.watch(batch) as watched:
            target(**watched.inputs)
        values.append(watched.loss)
    torch.testing.assert_close(*values)
    with loss.watch({"input_values": batch["input_values"]}) as watched:
        target(**watched.inputs)
    assert watched.loss is not None
    assert abs(float(watched.loss) - float(values[1] or 0)) > 1e-4
