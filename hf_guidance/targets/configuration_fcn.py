"""Configuration of the fully connected targets. It imports nothing from this package, so it loads from the Hub without
it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class FCNConfig(PreTrainedConfig):
    """Sizes of a fully connected image classifier: blocks of Linear, batch norm, ReLU and dropout, then a classifier.

    Args:
        image_size: Height and width of the images, in pixels.
        num_channels: Channels of the images.
        hidden_size: Width of every block.
        num_hidden_layers: Number of blocks.
        hidden_dropout_prob: Probability of zeroing an entry of a block's output.
        batch_norm: Whether a block has batch norm.

    Raises:
        ValueError: If a size is below 1, or the dropout is outside [0, 1).

    Source: Deep FCN and Wide FCN of the object recognition experiments, Subramaniam et al., NeurIPS 2025
    (arXiv 2410.20035); `FCNConfig.deep()` and `FCNConfig.wide()` return their sizes.
    """

    model_type = "fcn"

    image_size: int = 224
    num_channels: int = 3
    hidden_size: int = 2048
    num_hidden_layers: int = 50
    hidden_dropout_prob: float = 0.0
    batch_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("image_size", "num_channels", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.hidden_dropout_prob < 1:
            raise ValueError(f"hidden_dropout_prob is a probability in [0, 1), got {self.hidden_dropout_prob}")

    @classmethod
    def deep(cls, **changes: Any) -> FCNConfig:
        """Return the sizes of the paper's Deep FCN, which underfits: 50 blocks of 2048. `changes` replace fields."""
        return cls(**{"hidden_size": 2048, "num_hidden_layers": 50, **changes})

    @classmethod
    def wide(cls, **changes: Any) -> FCNConfig:
        """Return the sizes of the paper's Wide FCN, which overfits: 3 blocks of 8192. `changes` replace fields."""
        return cls(**{"hidden_size": 8192, "num_hidden_layers": 3, **changes})
