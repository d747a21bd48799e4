"""Image formats of networks from the Hub, from timm or in a folder."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import nn

from .image_decoding import PixelFormat


def pixel_format_of(source: str, size: int, *, trained: bool, given: int | None = None) -> PixelFormat:
    """Return size and normalisation of a network's images.

    Args:
        source: Hub id, local folder or `timm/<architecture>`.
        size: Size in pixels for a network without a size of its own.
        trained: Whether its own weights are used. Then its image processor decides the format.
        given: Size in pixels that overrides all others.

    Raises:
        ValueError: If a trained network has no image processor.
    """
    from transformers import AutoConfig, AutoImageProcessor

    architecture = source.removeprefix("timm/")
    if source.startswith("timm/") and not os.path.isdir(source) and not trained:
        import timm

        if timm.is_model(architecture):
            defaults: Any = timm.get_pretrained_cfg(architecture)
            return PixelFormat(given or (defaults.input_size[-1] if defaults and defaults.fixed_input_size else size))
    if not trained:
        own = _side(getattr(AutoConfig.from_pretrained(source, trust_remote_code=False), "image_size", None))
        return PixelFormat(given or own or size)
    try:
        processor: Any = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"the guide {source} comes without an image processor (preprocessor_config.json), so the size and "
            "normalisation of the images it was trained on are unknown: save the processor beside its weights, or load "
            "the guide with untrained=True for random weights."
        ) from error
    timms = getattr(processor, "data_config", None) or {}  # timm's own processor keeps everything here
    mean = timms.get("mean") or getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)
    std = timms.get("std") or getattr(processor, "image_std", None) or (0.5, 0.5, 0.5)
    own = timms.get("input_size") or getattr(processor, "crop_size", None) or getattr(processor, "size", None)
    return PixelFormat(given or _side(own) or size, tuple(mean), tuple(std))


def _side(size: Any) -> int | None:
    """Return the side of a square from any notation: 224, (3, 224, 224), {"height": 224, …}, {"shortest_edge": 224}."""
    if isinstance(size, (list, tuple)):
        return int(size[-1])
    if size is None or isinstance(size, int):
        return size
    return size["height"] if size.get("height") else size.get("shortest_edge")


def check_sees(network: nn.Module, name: str) -> None:
    """Raise ValueError if a network takes no images."""
    takes = inspect.signature(network.forward).parameters
    if "pixel_values" not in takes:
        raise ValueError(
            f"the guide {name} ({type(network).__name__}) takes {', '.join(list(takes)[:3])}, but no pixel_values: "
            "name an image model of the Hub, a folder with one, or timm/<architecture>."
        )


@torch.no_grad()
def check_takes(network: nn.Module, pixels: PixelFormat, name: str) -> None:
    """Raise ValueError if a network cannot run on images of this format, before any training."""
    try:
        network(pixel_values=torch.zeros(2, 3, pixels.size, pixels.size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]  # a bare assertion has no message
        raise ValueError(
            f"the guide {name} cannot take images of {pixels.size} × {pixels.size} pixels ({why}): choose another "
            "guide_image_size."
        ) from error
