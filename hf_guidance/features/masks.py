"""Masks of floats, which may hold what is added to attention scores: 0 where positions count, −inf at padding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

ADDED = -1e4  # additive masks hold this or less at padding

logger = logging.getLogger(__name__)


def of_floats(mask: Tensor, name: str) -> Tensor:
    """Read a mask of 1 and 0, or of 0 and what hides a position in attention scores. One of zeros hides none.

    Args:
        mask: The mask, `(batch, length)`.
        name: Its name, for the message.

    Returns:
        `(batch, length)` of bool: true where positions count.

    Raises:
        ValueError: If it holds other numbers.
    """
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
