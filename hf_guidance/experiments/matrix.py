"""Gains of several guides for several targets: cells with intervals, a table and a figure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeAlias

from hf_guidance.analysis.heat_maps import plot_matrix
from hf_guidance.experiments.report import Report, aligned
from hf_guidance.experiments.verdicts import Difference

Cells: TypeAlias = dict[str, dict[str, "Difference | None"]]


def cells_of(reports: Mapping[str, Report], guides: Mapping[str, str]) -> Cells:
    """Take the gain of each guided run over the target alone at equal steps.

    Args:
        reports: Target → its report, with differences.
        guides: Name of a run → name of its guide.

    Returns:
        Target → guide → gain on test data; None for two networks that cannot be compared.
    """
    cells: Cells = {}
    for target, report in reports.items():
        found = {entry["run"]: entry for entry in report["differences"] if entry["baseline"] == "alone"}
        cells[target] = {guide: found.get(run) for run, guide in guides.items()}
    return cells


def matrix_table(cells: Cells) -> str:
    """Format cells as a Markdown table: targets down, guides across, `+12.3 [9.1, 15.5]` in each."""
    guides = list(next(iter(cells.values())))
    lines = [[target, *(_cell(row[guide]) for guide in guides)] for target, row in cells.items()]
    return aligned([["target, guided by", *guides], *lines])


def plot_gains(cells: Cells, path: str | os.PathLike[str]) -> None:
    """Draw the cells as a heat map around 0 with their values, and save the figure."""
    guides = list(next(iter(cells.values())))
    entries = [[row[guide] for guide in guides] for row in cells.values()]
    unit = next((entry["unit"] for line in entries for entry in line if entry), "points")
    plot_matrix(
        [[float("nan") if entry is None else entry["mean"] for entry in line] for line in entries],
        [[_cell(entry).replace(" [", "\n[") for entry in line] for line in entries],
        rows=list(cells),
        columns=guides,
        label=f"gain on test data, {unit}",
        path=path,
    )


def _cell(entry: Difference | None) -> str:
    if entry is None:
        return "–"
    interval = entry["interval"]
    return f"{entry['mean']:+.1f}" + ("" if interval is None else f" [{interval[0]:+.1f}, {interval[1]:+.1f}]")
