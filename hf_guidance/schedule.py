"""Schedules: functions from the optimizer step to the weights of guidance and task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the guided steps done, in [0, 1) → factor
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


class Weights(NamedTuple):
    """Factors of the two terms of the loss at one optimizer step."""

    guidance: float
    task: float


Schedule = Callable[[int], Weights]  # the argument is the number of optimizer steps already taken


def check_schedule(name: str) -> None:
    """Raise ValueError for an unknown schedule. The message lists the known ones."""
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
    """Build the schedule of a run.

    Args:
        name: `constant`, or `linear` or `cosine` for a decay from `weight` to 0.
        weight: Largest guidance weight.
        stop_step: Optimizer step from which the guidance weight is 0 (*guidance as initialisation*). A decay ends here.
        prealign_steps: Number of first optimizer steps with task weight 0 and guidance weight `weight`.
        every: After pre-alignment, guide only at optimizer steps divisible by this number.
        total_steps: Optimizer steps of the run. A decay without `stop_step` ends here.

    Returns:
        A function from the number of optimizer steps already taken to `Weights`.

    Raises:
        ValueError: If the name is unknown, or a decay has no end.
    """
    check_schedule(name)
    end = stop_step
    if name != "constant" and stop_step is None:
        end = total_steps
        if end is None:
            raise ValueError(f"guidance_schedule {name!r} needs an end: set guidance_stop_step or total_steps.")

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
