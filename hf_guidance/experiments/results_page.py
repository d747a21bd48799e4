"""Results as Markdown: table, gains in words, command and machine, for results.md and for the pages of the recipes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_guidance.analysis.history import run_in_words
from hf_guidance.experiments.report import VERSIONS, Record, Report, Row, comparison_rows, markdown_table, versions_of
from hf_guidance.experiments.verdicts import EQUAL_TIME, Difference, in_words


def table_and_gains(rows: Sequence[Row], differences: Sequence[Difference], task: Mapping[str, Any]) -> str:
    """Format rows as a table, and below it each gain as a list item.

    Args:
        rows: Result of `comparison_rows`.
        differences: Result of `gains`.
        task: `metric` and `percent` of a report and, if runs are compared on validation data, `data`.
    """
    data = task.get("data", "test")
    table = markdown_table(rows, task["metric"], task["percent"], with_test=data == "test")
    return "\n".join([table, "", *(f"- {in_words(found, data)}" for found in differences)])


def block_of(report: Report) -> str:
    """Format one results file: its command, its table, its gains, and what it ran on."""
    task, environment = report["task"], report["environment"]
    results = table_and_gains(
        comparison_rows(report["runs"], metric=task["metric"]), report.get("differences", []), task
    ).rstrip()
    search: dict[float, list[float]] = {}
    for tried in report.get("learning_rate_search", []):
        rate = float(tried["run"].rpartition("-lr")[2])
        search.setdefault(rate, []).append(float("nan") if tried["validation"] is None else tried["validation"])
    factor, unit = (100, " %") if task["percent"] else (1, "")
    tried_words = ", ".join(f"{rate:g}: {factor * sum(v) / len(v):.1f}{unit}" for rate, v in search.items())
    said = f"Rates tried alone, validation {task['metric']}: {tried_words}. " if search else ""
    said = times_in_words(report["runs"]) + losses_in_words(report["runs"]) + said
    device, threads = environment["device"], environment.get("threads", 1)
    command = f"```sh\n{report['command']}\n```\n\n" if report.get("command") else ""
    made_with = {name: [environment[name]] for name in VERSIONS if name in environment} | versions_of(report["runs"])
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in made_with.items())
    return (
        f"{command}{results}\n\n{said}{device}, {threads} thread{'s' if threads > 1 else ''}; "
        f"{versions.replace('python', 'Python', 1)}.\n"
    )


def times_in_words(runs: Sequence[Record]) -> str:
    """Say how much time the baseline of equal time had beside the slowest guided run of its seed; empty without one."""
    longer = {run["seed"]: run["seconds"] for run in runs if run["run"] == EQUAL_TIME}
    guided = {seed: max((r["seconds"] for r in runs if r["seed"] == seed and r["guide"]), default=0) for seed in longer}
    ratios = [longer[seed] / guided[seed] for seed in longer if guided[seed]]
    if not ratios:
        return ""
    between = f", {min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
    return f"The longer baseline had {statistics.fmean(ratios):.2f} times the time of the slowest guided run{between}. "


def losses_in_words(runs: Sequence[Record]) -> str:
    """Say the task loss at the end, in training and on validation data, of each run; empty without curves."""
    found = []
    for name in dict.fromkeys(run["run"] for run in runs if run.get("training") and run.get("curve")):
        own = [run for run in runs if run["run"] == name]
        losses = [statistics.fmean(run[kind][-1]["loss"] for run in own) for kind in ("training", "curve")]
        found.append(f"{run_in_words(name)} {losses[0]:.3g}, {losses[1]:.3g}")
    return f"Task loss at the end, training and validation: {'; '.join(found)}. " if found else ""


def page_of(report: Report) -> str:
    """Format the results of a recipe as a page: results.md."""
    cut = "\nThe command is shown without what belongs to this machine alone.\n" if report.get("command_is_cut") else ""
    return f"# {report['task']['name']}: {report['recipe']}\n\n{block_of(report)}{cut}"
