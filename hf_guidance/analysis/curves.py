"""Matched runs in a picture: validation curves, and the similarity of every pair over time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_PAIRS = 8  # above it a legend hides the lines it names: a colour bar from first to last pair instead


def plot_comparison(
    results: Sequence[dict[str, Any]],
    metric: str,
    path: str | os.PathLike[str],
    percent: bool = True,
    log: bool = False,
) -> None:
    """Draw one panel of validation curves (mean over seeds, band from lowest to highest) and one of similarities per
    guided run, and save them as a picture.

    Args:
        results: of `comparison.carry_out`.
        metric: name of the curves' quantity.
        path: of the picture; its suffix decides the format.
        percent: whether the quantity is a fraction to be shown in percent.
        log: whether its axis is logarithmic.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["run"] for r in results))
    guided = [n for n in names if any(r["run"] == n and r["similarity"] for r in results)]
    figure = Figure(figsize=(5.2 + 4.2 * len(guided), 4.0), layout="constrained")
    panels = figure.subplots(1, 1 + len(guided), width_ratios=[1.25] + [1.0] * len(guided), squeeze=False)[0]
    for number, name in enumerate(names):
        _curve(panels[0], [r for r in results if r["run"] == name], name, f"C{number}", 100 if percent else 1)
    panels[0].set(xlabel="optimizer step", ylabel=f"validation {metric}" + (" (%)" if percent else ""))
    if log:
        panels[0].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=8)
    for panel, name in zip(panels[1:], guided, strict=True):
        _similarities(panel, [r for r in results if r["run"] == name], name)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _curve(panel: Axes, runs: Sequence[dict[str, Any]], name: str, color: str, factor: float) -> None:
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for point in run["curve"]:
            by_step.setdefault(point["step"], []).append(point["value"] * factor)
    steps = sorted(by_step)
    panel.plot(steps, [statistics.fmean(by_step[s]) for s in steps], color=color, label=name.replace("_", " "))
    if len(runs) > 1:
        lows, highs = [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps]
        panel.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)


def _similarities(panel: Axes, runs: Sequence[dict[str, Any]], name: str) -> None:
    from matplotlib import colormaps

    pairs = [key for key in runs[0]["similarity"][0] if key != "step"]
    for number, pair in enumerate(pairs):
        by_step: dict[int, list[float]] = {}
        for run in runs:
            for point in run["similarity"]:
                by_step.setdefault(point["step"], []).append(point[pair])
        steps = sorted(by_step)
        color = colormaps["viridis"](number / max(1, len(pairs) - 1))
        label = pair.replace("hidden_states.", "h").replace("~", " ~ ")
        panel.plot(steps, [statistics.fmean(by_step[s]) for s in steps], color=color, label=label, linewidth=1.2)
    measure = runs[0]["settings"]["guidance"]["measure"].replace("_", " ").replace("cka", "CKA")
    panel.set(xlabel="optimizer step", ylabel=measure, title=name.replace("_", " "))
    if len(pairs) <= MANY_PAIRS:
        panel.legend(frameon=False, fontsize=7, title="target ~ guide layer", title_fontsize=7)
