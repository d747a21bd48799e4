"""Values that are not finite: which they are, in words, and the error that names them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hf_guidance.similarity.pair_loss import Groups

GRADIENT = "norm of the gradient"
GUIDE_LAYER = "guide layer"
MAX_NAMED = 5  # values in an error
Seen: TypeAlias = Sequence[tuple[str, list[str], Tensor]]  # (where, names, their values)
Words: TypeAlias = tuple[list[str], list[str]]  # of losses and similarities, of gradients


def guide_layers_to_check(layers: Groups) -> dict[str, Tensor]:
    """Return a scalar for each layer of the guide that is NaN unless all of the layer's values are finite."""
    return {
        f"{GUIDE_LAYER} {name}": torch.stack([(0 * layer.values.detach()).sum() for layer in groups]).sum()
        for name, groups in layers.items()
    }


def words_for(seen: Seen, rank: int | None) -> Words:
    """Describe the values of a process that are not finite: losses and similarities with their places, then gradients.

    Args:
        seen: Places, such as the micro-step or none, with the names of values and the values `(names,)`.
        rank: Index of the process; None for the only one.
    """
    losses, gradients = [], []
    for where, names, values in seen:
        place = ", ".join(filter(None, [where, "" if rank is None else f"rank {rank}"]))
        for name, value in zip(names, values.tolist(), strict=True):
            if not math.isfinite(value):
                words = f"the {name} is {value}"
                if name == GRADIENT:
                    gradients.append(words)
                else:
                    losses.append(f"{words} ({place})" if place else words)
    return losses, gradients


def join(found: Sequence[Words]) -> str:
    """Join the words of all processes. Gradients are named only if nothing else is, since every rank has their norm."""
    words = [word for losses, _ in found for word in losses] or list(dict.fromkeys(w for _, ws in found for w in ws))
    more = len(words) - MAX_NAMED
    return "; ".join(words[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def not_finite(step: int, names: str, done: str, may_skip: bool) -> FloatingPointError:
    """Make the error of an optimizer step that is not finite.

    Args:
        step: Number of the step, from 1.
        names: Values that are not finite, in words.
        done: What was done with the step, in a sentence.
        may_skip: Whether such a step could be left out.
    """
    skip = ", or leave such steps out with on_non_finite='skip'" if may_skip else ""
    what = "Lower the learning rate, check the data" if skip else "Lower the learning rate, or check the data"
    if GUIDE_LAYER in names:
        what = (
            "It is the frozen guide that is not finite, whatever the learning rate: check its weights and its "
            "inputs, and load it in float32 or bfloat16 if it is in float16"
        )
    return FloatingPointError(f"Optimizer step {step} is not finite: {names}. {done} {what}{skip}.")
