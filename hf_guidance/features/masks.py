"""Masks of a batch: which of its positions are valid, and how to move these to the front."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

ToFrames: TypeAlias = Callable[[Tensor], "Tensor | None"]  # lengths of inputs → lengths of layers
KINDS = ("encoder", "decoder", "frames")  # of masks
ADDED = -1e4  # additive masks hold this or less at padding

logger = logging.getLogger(__name__)


def masks_of(tensors: Mapping[str, Tensor], to_frames: ToFrames | None = None) -> dict[str, Tensor]:
    """Return the valid positions of encoder and decoder, if the batch has them.

    Args:
        tensors: Columns of the batch.
        to_frames: Lengths of sounds → numbers of frames, into which a network joins their samples.

    Returns:
        `encoder`, `decoder` and, of sounds, `frames` → `(batch, length)` of bool.

    Raises:
        ValueError: If a mask holds numbers that are neither 0 and 1 nor 0 and −inf.
    """
    masks: dict[str, Tensor] = {}
    labels = tensors.get("labels")
    if (mask := tensors.get("decoder_attention_mask")) is not None:
        masks["decoder"] = valid_positions(mask, "decoder_attention_mask")
    elif (ids := tensors.get("decoder_input_ids", tensors.get("decoder_inputs_embeds"))) is not None:
        masks["decoder"] = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
        if labels is not None and labels.shape == ids.shape[:2]:
            masks["decoder"] = labels.ne(-100)
    if (mask := tensors.get("attention_mask")) is not None and mask.ndim == 2:
        masks["encoder"] = valid_positions(mask, "attention_mask")
        if to_frames is not None and "input_ids" not in tensors:
            valid = masks["encoder"].sum(1)
            frames = to_frames(torch.cat([valid, valid.new_tensor([mask.shape[1]])]))
            if frames is not None:
                masks["frames"] = torch.arange(int(frames[-1]), device=mask.device) < frames[:-1, None]
    return masks


def valid_positions(mask: Tensor, name: str = "attention_mask") -> Tensor:
    """Read a mask of 0 and 1, or of what is added to attention scores: 0 where they count, −inf at padding.

    Args:
        mask: The mask, `(batch, length)`.
        name: Its name, for the message.

    Returns:
        `(batch, length)` of bool.

    Raises:
        ValueError: If it holds numbers that are neither.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return torch.where((mask < 0).any(), mask == 0, mask != 0)  # without waiting for a device
    added = bool((mask < 0).any()) or not mask.any()
    if not ((mask == 0) | (mask <= ADDED if added else mask == 1)).all():
        raise ValueError(
            f"{name} holds {mask.unique()[:4].tolist()} …, expected 1 for valid positions and 0 for padding, or 0 and "
            "-inf. Pass it as integers or bool."
        )
    return mask == 0 if added else mask.bool()


def warn_if_added(tensors: Mapping[str, Tensor]) -> None:
    """Warn once of a mask `(batch, length)` of 0 and −inf, which networks of transformers read the other way round.

    Args:
        tensors: Columns of the batch, which the target gets as they are.
    """
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = tensors.get(name)
        if mask is None or mask.ndim != 2 or mask.dtype == torch.bool or not mask.numel():
            continue
        if (mask < 0).any() or (mask.is_floating_point() and not mask.any()):
            _say_that_it_is_swapped(name)


@cache
def _say_that_it_is_swapped(name: str) -> None:
    logger.warning(
        "%s (batch, length) holds 0 and -inf, which guidance reads as valid and padding. The target gets it as it is, "
        "and a network of transformers reads a mask of two axes as 1 for valid and 0 for padding: it attends to the "
        "wrong positions. Pass 0 and 1, or an additive mask of four axes (batch, 1, length, length).",
        name,
    )


def first_valid(mask: Tensor) -> Tensor:
    """Return `(batch, length)`: true at as many first positions of each row as the mask has valid ones."""
    return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)


def in_front(mask: Tensor) -> Tensor | None:
    """Return the order that moves each row's valid positions to its front; None if they are there."""
    if (mask[:, :-1] >= mask[:, 1:]).all():
        return None
    return mask.int().argsort(dim=1, descending=True, stable=True)


def over(mask: Tensor, features: Tensor) -> Tensor:
    """Append axes to `(batch, length)` so that it spreads over features `(batch, length, …)`."""
    return mask.reshape(mask.shape + (1,) * (features.ndim - 2))
