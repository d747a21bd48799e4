"""The baseline's fair chance: its learning rate, and as much training time as guidance takes."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerate import PartialState

from hf_guidance.experiments.report import Record
from hf_guidance.experiments.run import Run
from hf_guidance.experiments.verdicts import EQUAL_TIME

logger = logging.getLogger(__name__)

LONGER = "alone_longer"
MARGIN = 1.1  # of the time that the baseline gets, beyond that of the slowest guided run


def say_edge(best: float, rates: Sequence[float]) -> None:
    """Say so if the best learning rate is the lowest or the highest of those that were tried."""
    if len(set(rates)) > 1 and best in (min(rates), max(rates)) and PartialState().is_main_process:
        print(f"The best learning rate, {best:g}, is at the edge of {sorted(set(rates))}: try more on that side.")


def equal_time(run: Run, steps: int, results: list[Record], of: str | None = None) -> Run:
    """Return the unguided run, trained for 1.1 times the time of a guided run, on average over the seeds.

    Args:
        run: The unguided run.
        steps: Its optimizer steps.
        results: Records of the finished runs.
        of: Name of the guided run; the slowest if None.
    """
    more = math.ceil(max(1.0, MARGIN * _times(results, of)) * steps)
    return replace(run, name=f"{EQUAL_TIME}-{more}", training={"max_steps": more})


def longer(run: Run, steps: int, results: list[Record]) -> Run:
    """Return the unguided run, trained for twice the steps or 1.25 times the time of the slowest guided run.

    It takes whichever is longer.
    """
    more = int(steps * max(2.0, 1.25 * _times(results)) + 1)
    return replace(run, name=f"{LONGER}-{more}", training={"max_steps": more})


def _times(results: Sequence[Record], of: str | None = None) -> float:
    """Divide the time of a guided run, or of the slowest, by that of the target alone, both as means over the seeds.

    A single run may be slow by chance, where a processor is shared. The first steps of a process are slower. A run
    alone is the first one, so that with their time it would look slow, and get too few steps.
    """
    is_known = all("steady_seconds" in r for r in results)  # not in older records
    times: dict[str, list[float]] = {}
    for record in results:
        times.setdefault(record["run"], []).append(record["steady_seconds"] if is_known else record["seconds"])
    guided = {record["run"] for record in results if record["guide"] and of in (None, record["run"])}
    return max((statistics.fmean(times[name]) for name in guided), default=0.0) / statistics.fmean(times["alone"])


def best_learning_rate(
    runs: Sequence[Run], rates: Sequence[float], carry: Callable[[Run], Record], higher_is_better: bool
) -> tuple[float, list[Record]]:
    """Train the unguided runs at each learning rate and choose the best on validation data, averaged over seeds.

    A rate at which the loss of a run stops being finite counts as the worst.

    Args:
        runs: The unguided run of each seed.
        rates: Learning rates to try.
        carry: Trains a run and returns its result.
        higher_is_better: Whether a higher validation value is better.

    Returns:
        The best rate, and the results of all runs.

    Raises:
        FloatingPointError: If the loss stays finite at none of the rates.
    """
    worst = -math.inf if higher_is_better else math.inf
    means: dict[float, float] = {}
    results: list[Record] = []
    for rate in dict.fromkeys(rates):
        found = [_tried(run, rate, carry) for run in runs]
        values = [math.nan if result["validation"] is None else result["validation"] for result in found]
        means[rate] = mean if math.isfinite(mean := statistics.fmean(values)) else worst
        results += found
    best = (max if higher_is_better else min)(means, key=means.__getitem__)
    if means[best] == worst:
        raise FloatingPointError(f"the loss does not stay finite at any of the rates {list(means)}: try lower ones.")
    return best, results


def rate_name(name: str, rate: float) -> str:
    """Return the name of the run that tries a learning rate."""
    return f"{name}-lr{rate:g}"


def _tried(run: Run, rate: float, carry: Callable[[Run], Record]) -> Record:
    name = rate_name(run.name, rate)
    try:
        return carry(replace(run, name=name, training={**run.training, "learning_rate": rate}))
    except FloatingPointError as error:
        logger.warning("%s counts as the worst: %s", name, error)
        return {"run": name, "seed": run.seed, "settings": {"learning_rate": rate}, "validation": None}
