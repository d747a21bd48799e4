"""Configuration of ResNets without skips. It imports nothing from this package, so it loads from the Hub without it."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

BLOCK_TYPES = {"basic": 1, "bottleneck": 4}  # output channels of a block / its inner width
DEPTHS = {18: ("basic", [2, 2, 2, 2]), 34: ("basic", [3, 4, 6, 3]), 50: ("bottleneck", [3, 4, 6, 3])}


class PlainResNetConfig(PreTrainedConfig):
    """Sizes of a ResNet without skip connections. The defaults are those of the paper's Deep ConvNet, from ResNet-50.

    Args:
        num_channels: Channels of the images.
        embedding_size: Channels of the stem.
        hidden_sizes: Output channels of each stage.
        depths: Blocks in each stage. Every stage but the first halves height and width in its first block.
        block_type: `"basic"` (two 3 x 3 convolutions) or `"bottleneck"` (1 x 1, 3 x 3, 1 x 1).

    Raises:
        ValueError: If the block type is unknown, a size is below 1, a size of bottleneck blocks is no multiple of 4, or
            `hidden_sizes` and `depths` have different lengths.

    Source: Deep ConvNet of the object recognition experiments, Subramaniam et al., NeurIPS 2025 (arXiv 2410.20035);
    ResNet: He et al., CVPR 2016 (arXiv 1512.03385), with the stride in the 3 x 3 convolution of a bottleneck.
    """

    model_type = "plain_resnet"

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    depths: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    block_type: str = "bottleneck"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.block_type not in BLOCK_TYPES:
            raise ValueError(f"unknown block_type {self.block_type!r}; choose one of {', '.join(BLOCK_TYPES)}")
        if not self.depths or len(self.depths) != len(self.hidden_sizes):
            raise ValueError(f"hidden_sizes and depths name each stage: got {self.hidden_sizes} and {self.depths}")
        if min(self.num_channels, self.embedding_size, *self.depths, *self.hidden_sizes) < 1:
            raise ValueError(f"sizes must be at least 1, got {self.hidden_sizes}, {self.depths}, {self.embedding_size}")
        if any(size % BLOCK_TYPES[self.block_type] for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes of bottleneck blocks must be multiples of 4, got {self.hidden_sizes}")

    @classmethod
    def of_depth(cls, depth: int, **changes: Any) -> PlainResNetConfig:
        """Return the sizes of ResNet-18, -34 or -50. `changes` replace fields."""
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        block_type, depths = DEPTHS[depth]
        hidden_sizes = [64 * BLOCK_TYPES[block_type] * 2**stage for stage in range(4)]
        return cls(**{"block_type": block_type, "depths": depths, "hidden_sizes": hidden_sizes, **changes})
