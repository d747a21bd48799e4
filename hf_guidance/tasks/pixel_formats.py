"""How a network of the Hub, of timm or in a folder wants its images."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .image_rows import PixelFormat


def pixel_format_of(source: str, size: int | None, given: int | None = None) -> PixelFormat:
    """Size and normalisation of a network's images, as far as its image processor and config say.

    Args:
        source: Hub id, local folder or ``timm/<architecture>``.
        size: what a network that takes any size is given, in pixels.
        given: overrules both.

    Returns:
        The format; mean and standard deviation are 0.5 where nothing is said.
    """
    from transformers import AutoConfig, AutoImageProcessor

    config: Any = None
    if source.startswith("timm/") and not os.path.isdir(source):
        import timm

        architecture = source.removeprefix("timm/")
        if timm.is_model(architecture):
            pretrained: Any = timm.get_pretrained_cfg(architecture)
            own = pretrained.input_size[-1] if pretrained and pretrained.fixed_input_size else None
            if pretrained is None or "." not in architecture:  # no tag, no weights: untrained
                return PixelFormat(given or own or size or 224)
            return PixelFormat(given or own or size or 224, tuple(pretrained.mean), tuple(pretrained.std))
    config = AutoConfig.from_pretrained(source)
    own = getattr(config, "image_size", None)
    own = own[0] if isinstance(own, (list, tuple)) else own
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):  # a config alone, of a network that is to stay untrained
        return PixelFormat(given or own or size or 224)
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    data = getattr(processor, "data_config", {})  # timm's
    mean, std = mean or data.get("mean"), std or data.get("std")
    half = (0.5, 0.5, 0.5)
    return PixelFormat(given or own or size or 224, tuple(mean or half), tuple(std or half))


@torch.no_grad()
def check_takes(network: nn.Module, pixels: PixelFormat, name: str) -> None:
    """Raise ValueError if a network cannot be run on images of a format, before anything is trained."""
    try:
        network(pixel_values=torch.zeros(2, 3, pixels.size, pixels.size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise ValueError(
            f"the guide {name} cannot take images of {pixels.size} × {pixels.size} pixels ({str(error).splitlines()[0]}"
            "): choose another --guide_image_size."
        ) from error
