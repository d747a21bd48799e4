"""Ratios of measured seconds."""

from __future__ import annotations

import statistics
from typing import Any, Literal, TypedDict

KINDS: tuple[Literal["median"], Literal["minimum"]] = ("median", "minimum")


class Seconds(TypedDict, total=False):
    """Seconds of one variant; `forward` and `all` where they are known."""

    median: float
    minimum: float
    forward: Seconds
    all: list[float]


class Timed(TypedDict, total=False):
    """Seconds of the variants, and how often a guided step runs the guide and the paper's has a batch."""

    plain: Seconds
    guide: Seconds
    guided: Seconds
    paper: Seconds
    guide_forwards: int
    batches_of_a_step: int


def middle_and_least(values: list[float]) -> dict[str, float]:
    """Compute median and minimum."""
    return {"median": statistics.median(values), "minimum": min(values)}


def summary(found: Timed) -> dict[str, Any]:
    """Compute split, floor and ratios from the seconds of the variants.

    Args:
        found: `plain`, `guide`, `guided` and, if measured, `paper` → `median` and `minimum` of their seconds; those of
            plain and guided also hold `forward`. `guide_forwards` is the number of runs of the guide per guided step,
            and `batches_of_a_step` that of the paper's formulation.
    """
    plain, guided, runs = found["plain"], found["guided"], found["guide_forwards"]
    guide = {kind: runs * found["guide"][kind] for kind in KINDS}
    floor = {kind: plain[kind] + guide[kind] for kind in KINDS}
    more = {kind: guided["forward"][kind] - plain["forward"][kind] for kind in KINDS}
    every = found["batches_of_a_step"]  # the paper's formulation runs the guide for each of them
    paper_floor = {kind: plain[kind] + every * found["guide"][kind] for kind in KINDS}
    ratios = {
        "overhead": {kind: guided[kind] / floor[kind] for kind in KINDS},
        "guided_over_plain": {kind: guided[kind] / plain[kind] for kind in KINDS},
    }
    if paper := found.get("paper"):
        ratios["paper_overhead"] = {kind: paper[kind] / paper_floor[kind] for kind in KINDS}
        ratios["paper_over_plain"] = {kind: paper[kind] / plain[kind] for kind in KINDS}
    split = {
        "guide_forward": guide["median"],
        "grams_and_measures": more["median"] - guide["median"],
        "extra_backward": guided["median"] - plain["median"] - more["median"],
    }
    return {"floor": floor, "split": split, **ratios}


def overhead_of_rounds(found: Timed, rounds: int) -> dict[str, Any]:
    """Compute the overhead of each round, and its mean and standard error (None for one round).

    In a round the variants run one after the other, so a slow drift of the CPU's speed affects all of them equally.

    Args:
        found: As in `summary`; plain, guide and guided also hold `all` seconds, equally many per round.
        rounds: Number of rounds.
    """

    def of_round(name: Literal["plain", "guide", "guided"], number: int) -> float:
        seconds = found[name]["all"]
        count = len(seconds) // rounds
        return statistics.fmean(seconds[number * count : (number + 1) * count])

    floors = [of_round("plain", i) + found["guide_forwards"] * of_round("guide", i) for i in range(rounds)]
    every = [of_round("guided", i) / floor for i, floor in enumerate(floors)]
    error = statistics.stdev(every) / rounds**0.5 if rounds > 1 else None
    return {"mean": statistics.fmean(every), "standard_error": error, "all": every}
