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


def check_warmup(warmup_steps: int, prealign_steps: int, stop_step: int | None, total_steps: int | None = None) -> None:
    """Raise ValueError if a warm-up has a negative length, or does not end before guidance stops and within the run.

    Args:
        warmup_steps: Optimizer steps of the warm-up; 0 for none, which is always possible.
        prealign_steps: Optimizer steps of pre-alignment, before it.
        stop_step: Optimizer step at which guidance stops; None if it does not.
        total_steps: Optimizer steps of the run; None if not known.
    """
    if warmup_steps < 0:
        raise ValueError(f"guidance_warmup_steps is {warmup_steps}; it must be at least 0.")
    end = prealign_steps + warmup_steps
    words = f"guidance_warmup_steps is {warmup_steps}"
    words += f" after prealign_steps={prealign_steps}" if prealign_steps else ""
    if warmup_steps and stop_step is not None and end >= stop_step:
        raise ValueError(
            f"{words}, but guidance stops at step {stop_step}, before it has its full weight: lower "
            "guidance_warmup_steps, or raise guidance_stop_step."
        )
    if warmup_steps and total_steps is not None and end > total_steps:
        raise ValueError(
            f"{words}, but the run has {total_steps} optimizer steps: lower guidance_warmup_steps, or train longer."
        )


def make_schedule(
    name: str,
    weight: float,
    *,
    stop_step: int | None = None,
    prealign_steps: int = 0,
    warmup_steps: int = 0,
    every: int = 1,
    total_steps: int | None = None,
    stopped_at: int | None = None,
) -> Schedule:
    """Build the schedule of a run.

    Args:
        name: `constant`, or `linear` or `cosine` for a decay from `weight` to 0.
        weight: Largest guidance weight.
        stop_step: Optimizer step from which the guidance weight is 0 (*guidance as initialisation*). A decay ends here.
        prealign_steps: Number of first optimizer steps with task weight 0 and guidance weight `weight`.
        warmup_steps: Number of optimizer steps after pre-alignment over which the guidance weight rises linearly, from
            `weight / warmup_steps` to `weight`. A decay starts after them.
        every: After pre-alignment, guide only at optimizer steps divisible by this number.
        total_steps: Optimizer steps of the run. A decay without `stop_step` ends here.
        stopped_at: Optimizer step from which guidance is off for good, pre-alignment included. It does not move the end
            of a decay.

    Returns:
        A function from the number of optimizer steps already taken to `Weights`.

    Raises:
        ValueError: If the name is unknown, a decay has no end, or the warm-up is too long for the run.
    """
    check_schedule(name)
    check_warmup(warmup_steps, prealign_steps, stop_step, total_steps)
    end = stop_step
    if name != "constant" and stop_step is None:
        end = total_steps
        if end is None:
            raise ValueError(f"guidance_schedule {name!r} needs an end: set guidance_stop_step or total_steps.")

    start = prealign_steps + warmup_steps  # of the decay

    def schedule(step: int) -> Weights:
        if stopped_at is not None and step >= stopped_at:
            return Weights(0.0, 1.0)
        if step < prealign_steps:
            return Weights(weight, 0.0)
        if (end is not None and step >= end) or step % every:
            return Weights(0.0, 1.0)
        if step < start:
            return Weights(weight * (step - prealign_steps + 1) / warmup_steps, 1.0)
        if end is None:
            return Weights(weight, 1.0)
        return Weights(weight * SCHEDULES[name]((step - start) / (end - start)), 1.0)

    return schedule
