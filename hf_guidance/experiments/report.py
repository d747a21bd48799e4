"""Results of matched runs as numbers: mean ± standard deviation over seeds, guided runs against the unguided one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, TypedDict

from hf_guidance.analysis.history import Curves, SimilarityMap, run_in_words
from hf_guidance.card.contents import RunFacts

VERSIONS = ("python", "torch", "transformers", "accelerate", "hf_guidance")


class Record(Curves, total=False):
    """A run of a report: what it was made with and what came of it."""

    steps: int
    parameters: int
    target: str
    environment: dict[str, Any]
    validation: Any  # a number; None where the loss did not stay finite
    test: dict[str, float]
    seconds: float
    steady_seconds: float  # without the warming up of a process
    card: RunFacts
    film: dict[str, SimilarityMap]  # optimizer step → map


class Report(TypedDict, total=False):
    """Content of `results.json`."""

    recipe: str
    command: str
    command_is_cut: bool
    environment: dict[str, Any]  # of the process that wrote the report
    versions: dict[str, list[str]]  # name of a library → its versions that made the runs
    task: dict[str, Any]
    learning_rate_search: list[dict[str, Any]]
    runs: list[Record]
    table: list[Row]
    claim: str
    differences: list[Any]  # of type `verdicts.Difference`


class Row(TypedDict):
    """The runs of one name, over their seeds: means, and (mean, standard deviation).

    `steps_between` is the least and the most steps of a run.
    """

    run: str
    seeds: list[int]
    steps: int
    steps_between: tuple[int, int]
    seconds: float
    validation: tuple[float, float | None] | None
    test: tuple[float, float | None] | None


def versions_of(runs: Sequence[Record]) -> dict[str, list[str]]:
    """Collect the versions that runs were made with: name of a library, or Python → each of its versions."""
    made = [run.get("environment", {}) for run in runs]
    found = {name: list(dict.fromkeys(own[name] for own in made if name in own)) for name in VERSIONS}
    return {name: versions for name, versions in found.items() if versions}


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute mean and sample standard deviation; the latter is None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def value_at(result: Record, *, step: float = math.inf, seconds: float = math.inf) -> float | None:
    """Return the first validation value of a run at or after `step` or `seconds` of training.

    Measured time varies, so a run may end slightly before `seconds`. If it came within five percent, its last value
    counts. If it ended earlier, the result is None.
    """
    after = [p for p in result["curve"] if p["step"] >= step or p["seconds"] >= seconds]
    if not after and math.isfinite(seconds) and result["curve"][-1]["seconds"] >= 0.95 * seconds:
        return result["curve"][-1]["value"]
    return after[0]["value"] if after else None


def comparison_rows(
    results: Sequence[Record], baseline: str = "alone", longer: str = "alone_longer", metric: str = "accuracy"
) -> list[Row]:
    """Return one row per run name, over its seeds, in order of appearance.

    If there are runs called `longer`, their curves give two more rows for the baseline. One is at twice the steps, the
    other at the training time of the slowest guided run of the same seed.

    Returns:
        Dicts of `run`, `seeds`, `steps`, `seconds` (mean), `validation` and `test` (each mean and std, or None).
    """
    rows = []
    for name in dict.fromkeys(r["run"] for r in results):
        if name == longer:
            continue
        runs = [r for r in results if r["run"] == name]
        rows.append(_row(name, runs, [r["validation"] for r in runs], [r["test"].get(metric) for r in runs]))
    at = {r["seed"]: r for r in results if r["run"] == longer}
    alone = {r["seed"]: r for r in results if r["run"] == baseline}
    guided = {s: max((r["seconds"] for r in results if r["guide"] and r["seed"] == s), default=0.0) for s in at}
    place = next((i + 1 for i, row in enumerate(rows) if row["run"] == baseline), 0)
    if at and all(guided.values()):
        equal = [value_at(at[s], seconds=guided[s]) for s in at]
        row = _row(f"{baseline}, equal time", list(at.values()), equal, [None])
        row["seconds"] = statistics.fmean(guided.values())
        row["steps"] = round(statistics.fmean(at[s]["steps"] * guided[s] / at[s]["seconds"] for s in at))
        row["steps_between"] = (row["steps"], row["steps"])
        rows.insert(place, row)
    if at:
        steps = 2 * next(iter(alone.values()))["steps"]
        double = [value_at(at[s], step=steps) for s in at]
        row = _row(f"{baseline}, twice the steps", list(at.values()), double, [None])
        row["seconds"] = statistics.fmean(r["seconds"] * steps / r["steps"] for r in at.values())
        row["steps"], row["steps_between"] = steps, (steps, steps)
        rows.insert(place, row)
    return rows


def _row(name: str, runs: Sequence[Record], validation: Sequence[Any], test: Sequence[Any]) -> Row:
    return {
        "run": name,
        "seeds": [r["seed"] for r in runs],
        "steps": round(statistics.fmean(r["steps"] for r in runs)),
        "steps_between": (min(r["steps"] for r in runs), max(r["steps"] for r in runs)),
        "seconds": statistics.fmean(r["seconds"] for r in runs),
        "validation": None if None in validation else mean_std(validation),
        "test": None if None in test else mean_std(test),
    }


def markdown_table(rows: Sequence[Row], metric: str, percent: bool, with_test: bool = True) -> str:
    """Format rows as a Markdown table with aligned columns.

    Args:
        rows: The rows.
        metric: Name of the metric.
        percent: Whether it is a fraction that is shown in percent.
        with_test: Whether there is a column with values on test data.
    """
    header = ["run", "seeds", "steps", "training time", f"validation {metric}", f"test {metric}"]
    cells = [header] + [
        [
            run_in_words(row["run"]),
            " ".join(map(str, row["seeds"])),
            _steps(row),
            f"{row['seconds']:.0f} s",
            _plus_minus(row["validation"], percent),
            _plus_minus(row["test"], percent),
        ]
        for row in rows
    ]
    return aligned(cells if with_test else [line[:-1] for line in cells])


def _steps(row: Row) -> str:
    least, most = row["steps_between"]
    return str(row["steps"]) if least == most else f"{least} to {most}"


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Format cells as a Markdown table with aligned columns; the first line is the header."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _plus_minus(value: tuple[float, float | None] | None, percent: bool) -> str:
    if value is None:
        return "–"
    mean, std = value
    factor, unit = (100, " %") if percent else (1, "")
    return f"{mean * factor:.2f}{unit}" if std is None else f"{mean * factor:.2f} ± {std * factor:.2f}{unit}"
