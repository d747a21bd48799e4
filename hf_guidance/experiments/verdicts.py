"""Verdicts: whether guided runs beat their baseline, in paired differences over seeds with an interval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from hf_guidance.analysis.history import run_in_words
from hf_guidance.experiments.report import Record

EQUAL_TIME = "alone_equal_time"
LEVEL = 0.95
BESIDE = ("alone", EQUAL_TIME, "alone_longer", "alone_shifted", "guide_itself")  # what no gain is reported for
FEWEST = 3  # seeds, below which an interval says nothing


class Difference(TypedDict):
    """A guided run against a baseline, on test data.

    `values` are seed → gain: points for a share, percent of the baseline for any other metric, above 0 where the guided
    run is better. `interval` is that of Student's t at 95 %, and `p` two-sided; both are None below three seeds.
    """

    run: str
    baseline: str
    unit: str
    values: dict[int, float]
    mean: float
    interval: tuple[float, float] | None
    p: float | None


def gains(results: Sequence[Record], task: Mapping[str, Any]) -> list[Difference]:
    """Compare each guided or distilled run with the baseline at equal steps, and at equal time if there is such a run.

    Args:
        results: Records of the runs.
        task: `metric`, `percent` and, if a lower value is better, `higher_is_better`, of a report.

    Returns:
        One entry for each such run and baseline with a seed in common.
    """
    by_name: dict[str, dict[int, Record]] = {}
    for record in results:
        by_name.setdefault(record["run"], {})[record["seed"]] = record
    guided = [name for name in by_name if name not in BESIDE]
    found = []
    for name in guided:
        for baseline in ("alone", EQUAL_TIME):
            seeds = by_name[name].keys() & by_name.get(baseline, {}).keys()
            pairs = {seed: (by_name[name][seed], by_name[baseline][seed]) for seed in sorted(seeds)}
            if pairs:
                values = {seed: _gain(*pair, task) for seed, pair in pairs.items()}
                found.append(difference(name, baseline, values, "points" if task["percent"] else "%"))
    return found


def _gain(guided: Record, baseline: Record, task: Mapping[str, Any]) -> float:
    one, other = (run["test"][task["metric"]] for run in (guided, baseline))
    sign = 1 if task.get("higher_is_better", True) else -1
    return 100 * sign * ((one - other) if task["percent"] else (one - other) / other)


def difference(run: str, baseline: str, values: Mapping[int, float], unit: str) -> Difference:
    """Compute mean, interval and p of paired differences.

    Args:
        run: Name of the guided run.
        baseline: Name of the run that it is compared with.
        values: Seed → gain.
        unit: Unit of the gains.
    """
    numbers = list(values.values())
    mean, interval, p = statistics.fmean(numbers), None, None
    if len(numbers) >= FEWEST:
        from scipy import stats

        half = stats.t.ppf((1 + LEVEL) / 2, len(numbers) - 1) * stats.sem(numbers)
        interval = (float(mean - half), float(mean + half))
        p = float(stats.ttest_1samp(numbers, 0.0).pvalue)
    return {
        "run": run,
        "baseline": baseline,
        "unit": unit,
        "values": dict(values),
        "mean": mean,
        "interval": interval,
        "p": p,
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p values of several claims, so that the chance of a single false one is as small as that of one.

    Args:
        p_values: Name of a claim → its p value.

    Returns:
        Name → adjusted p value, in the same order.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    adjusted, largest = dict(p_values), 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def in_words(found: Difference, data: str = "test") -> str:
    """Write a difference as one line, such as `+12.3 points [9.1, 15.5] (seeds 0 1 2)`.

    Args:
        found: The difference.
        data: Name of the data that it was measured on.
    """
    values, unit = found["values"], found["unit"]
    interval = found["interval"]
    shown = "" if interval is None else f" [{interval[0]:+.1f}, {interval[1]:+.1f}]"
    each = ", ".join(f"{value:+.1f}" for value in values.values())
    against = {"alone": "alone, equal steps", EQUAL_TIME: "alone, equal time"}.get(found["baseline"], found["baseline"])
    run = run_in_words(found["run"])
    what = f"gain of {run} over {against}" if unit == "%" else f"{run} − {against}"  # a lower loss is a gain
    return f"{what}, {data}: {found['mean']:+.1f} {unit}{shown} (seeds {' '.join(map(str, values))}: {each})"
