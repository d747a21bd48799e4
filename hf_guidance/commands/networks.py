"""Networks named on the command line, and an example of what they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.guide.inputs import accepted_columns, vocabulary_size
from hf_guidance.guide.loading import load_guide
from hf_guidance.tasks.image_decoding import PixelFormat
from hf_guidance.tasks.pixel_formats import pixel_format_of

SIDE = 64  # pixels of an image for a network that takes any size
LENGTH = 8  # tokens of an example


def load(name: str, seed: int | None) -> nn.Module:
    """Load a network, with random weights from a seed if one is given."""
    return load_guide(name, untrained=seed is not None, seed=seed or 0)


def kind_of(network: nn.Module, name: str) -> str:
    """Tell whether a network takes `images` or `text`.

    Raises:
        ValueError: If it takes neither.
    """
    columns = accepted_columns(network)
    for column, kind in (("pixel_values", "images"), ("input_ids", "text")):
        if column in columns:
            return kind
    raise ValueError(f"{name} takes {', '.join(columns)}; expected pixel_values or input_ids, of images or text.")


def pixels_of(name: str, seed: int | None, size: int | None) -> PixelFormat:
    """Return the size and normalisation of the images of a network."""
    try:
        return pixel_format_of(name, size or SIDE, trained=seed is None, given=size)
    except ValueError as error:
        if "without an image processor" not in str(error):
            raise
        raise ValueError(
            f"{name} comes without an image processor, so that the size and normalisation of its images are unknown: "
            "save the processor beside its weights, or take random weights (--untrained_a, --untrained_b)."
        ) from error


def example_for(network: nn.Module, name: str, size: int | None = None) -> dict[str, Tensor]:
    """Make two rows of random input that a network takes.

    Raises:
        ValueError: If it takes neither images nor text.
    """
    random = torch.Generator().manual_seed(0)
    if kind_of(network, name) == "images":
        side = pixel_format_of(name, SIDE, trained=False, given=size).size
        config: Any = getattr(network, "config", None)
        channels = getattr(config, "num_channels", 3) or 3
        return {"pixel_values": torch.rand(2, channels, side, side, generator=random)}
    ids = torch.randint(vocabulary_size(network) or 2, (2, LENGTH), generator=random)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in accepted_columns(network):
        example["decoder_input_ids"] = ids
    return example
