"""The targets of the object recognition experiments, under the names that the recipes use."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, ResNetConfig

from .configuration_fcn import FCNConfig
from .configuration_plain_resnet import BLOCK_TYPES, DEPTHS, PlainResNetConfig
from .modeling_fcn import FCNForImageClassification
from .modeling_plain_resnet import PlainResNetForImageClassification

VISION_TARGETS = ("deep_fcn", "wide_fcn", "resnet50_without_skips")


def vision_target(
    name: str,
    image_size: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    dropout: float | None = None,
    **names: Any,
) -> PreTrainedModel:
    """Build a target with random weights.

    Args:
        name: One of `VISION_TARGETS`.
        image_size: Height and width of the images for an FCN, in pixels; a ResNet takes any.
        width: Width of an FCN's blocks, or of a ResNet's stem, which the other widths follow; None takes the paper's.
        depth: Number of an FCN's blocks, or 18, 34 or 50 for a ResNet; None takes the paper's.
        dropout: Dropout probability in an FCN's blocks; None means no dropout.
        **names: Config fields with the names or the number of the labels.
    """
    if name == "resnet50_without_skips":
        config = PlainResNetConfig.of_depth(depth or 50, **names)
        if width is not None:
            config.hidden_sizes = [size * width // config.embedding_size for size in config.hidden_sizes]
            config.embedding_size = width
        return PlainResNetForImageClassification(config)
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "hidden_dropout_prob": dropout}
    given = {field: value for field, value in sizes.items() if value is not None}
    make = FCNConfig.deep if name == "deep_fcn" else FCNConfig.wide
    return FCNForImageClassification(make(image_size=image_size, **given, **names))


def small_resnet(name: str, width: int) -> ResNetConfig:
    """Return the sizes of a ResNet with skips whose stem has a width, which the other widths follow.

    Args:
        name: `resnet18`, `resnet34` or `resnet50`.
        width: Width of the stem, 64 in the paper.
    """
    layer_type, depths = DEPTHS[int(name.removeprefix("resnet"))]
    sizes = [width * BLOCK_TYPES[layer_type] * 2**stage for stage in range(4)]
    return ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=depths, layer_type=layer_type)
