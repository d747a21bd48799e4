"""The targets of the object recognition experiments by the names that the recipes give them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .configuration_fcn import FCNConfig
from .configuration_plain_resnet import PlainResNetConfig
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
    """A network called untrainable, with random weights.

    Args:
        name: one of `VISION_TARGETS`.
        image_size: of an FCN, in pixels; a ResNet takes any.
        width: of an FCN's blocks; None for the paper's.
        depth: blocks of an FCN, or 18, 34 or 50 of a ResNet; None for the paper's.
        dropout: of an FCN's blocks; None for none.
        **names: of the labels, or their number, for the config.
    """
    if name == "resnet50_without_skips":
        return PlainResNetForImageClassification(PlainResNetConfig.of_depth(depth or 50, **names))
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "hidden_dropout_prob": dropout}
    given = {field: value for field, value in sizes.items() if value is not None}
    make = FCNConfig.deep if name == "deep_fcn" else FCNConfig.wide
    return FCNForImageClassification(make(image_size=image_size, **given, **names))
