"""Optimizer step → weight of the guidance and weight of the task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

SCHEDULES: dict[str, Callable[[float], float]] = {  # fraction of the guided steps done, in [0, 1) → factor
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


class Weights(NamedTuple):
    """What the two terms of the loss are multiplied by at one optimizer step."""

    guidance: float
    task: float


Schedule = Callable[[int], Weights]  # of the number of optimizer steps already taken


def check_schedule(name: str) -> None:
    """Raise ValueError, with the possible names, for an unknown schedule."""
    if name not in SCHEDULES:
        raise ValueError(f"Unknown guidance_schedule {name!r}; possible are {', '.join(SCHEDULES)}.")


def make_schedule(
    name: str,
    weight: float,
    *,
    stop_step: int | None = None,
    prealign_steps: int = 0,
    every: int = 1,
    total_steps: int | None = None,
) -> Schedule:
    """Build the schedule of a run: a function of the number of optimizer steps already taken.

    Args:
        name: ``constant``, or ``linear`` / ``cosine`` decay from `weight` to 0.
        weight: the guidance weight at its highest.
        stop_step: guidance is 0 from this step on (*guidance as initialisation*); a decay ends here.
        prealign_steps: for so many steps at the start the task's weight is 0 and the guidance's is `weight`.
        every: after pre-alignment, guidance is 0 at all steps but each so-manieth.
        total_steps: length of the run, where a decay without `stop_step` ends.

    Raises:
        ValueError: an unknown name, or a decay whose end is unknown.
    """
    check_schedule(name)
    end = stop_step
    if name != "constant" and stop_step is None:
        end = total_steps
        if end is None:
            raise ValueError(f"guidance_schedule {name!r} needs an end: set guidance_stop_step, or give total_steps.")

    def schedule(step: int) -> Weights:
        if step < prealign_steps:
            return Weights(weight, 0.0)
        if (end is not None and step >= end) or step % every:
            return Weights(0.0, 1.0)
        if end is None:
            return Weights(weight, 1.0)
        progress = (step - prealign_steps) / (end - prealign_steps)
        return Weights(weight * SCHEDULES[name](progress), 1.0)

    return schedule
