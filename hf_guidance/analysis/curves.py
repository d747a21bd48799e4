"""Figures of one run or of matched runs: validation curves, losses, and the similarity of every pair over time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.history import (
    Curves,
    History,
    debiased_curve,
    measure_in_words,
    similarity_curves,
    training_curve,
    validation_curve,
)
from hf_guidance.analysis.runs import colours_of, label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points: TypeAlias = Literal["curve", "training", "similarity", "debiased", "gradients"]

SHORT = 5  # range of a logarithmic axis, largest over smallest, that takes ticks at even distances
MANY_PAIRS = 8  # above this, a colour bar replaces the legend
LOWEST, HIGHEST = -0.2, 1.0  # similarities that a panel shows


def plot_comparison(
    results: Sequence[Curves],
    metric: str,
    path: str | os.PathLike[str],
    percent: bool = True,
    log: bool = False,
    chance: float | None = None,
) -> None:
    """Draw validation curves, losses, and the similarities of each guided run, and save the figure.

    The validation curve is the mean over seeds; its band reaches from the lowest seed to the highest. A run has one
    colour in all figures. A last panel has the angle between the gradients of guidance and task, if it was logged.

    Args:
        results: Records of the runs, from `comparison.carry_out`.
        metric: Name of the validation metric.
        path: Where to save the figure; the suffix decides the format.
        percent: Whether the metric is a fraction that is shown in percent.
        log: Whether the axis of the metric is logarithmic.
        chance: Value of the metric by guessing, drawn as a dotted line where it is near the curves; None draws none.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["run"] for r in results))
    guided = [n for n in names if any(r["run"] == n and r["similarity"] for r in results)]
    has_gradients = any(r.get("gradients") for r in results)
    count = 2 + len(guided) + has_gradients
    columns = min(count, 4)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    panels = grid[:count]
    for spare in grid[len(panels) :]:
        spare.set_axis_off()
    colours = colours_of(names)
    for name in names:
        runs = [r for r in results if r["run"] == name]
        _curve(panels[0], runs, colours[name], 100 if percent else 1)
        _losses(panels[1], runs, colours[name])
    if chance is not None:
        shown = panels[0].get_ylim()  # which a far line must not flatten
        words = f"chance, {100 * chance:.3g} %" if percent else f"chance, {chance:.3g}"
        panels[0].axhline(chance * (100 if percent else 1), color="0.5", linestyle=":", linewidth=1, label=words)
        panels[0].set_ylim(shown)
    panels[1].set(xlabel="optimizer step", ylabel="task loss", yscale="log")
    panels[1].set_title("dashed: training, solid: validation", fontsize=8)
    panels[0].set(xlabel="optimizer step", ylabel=f"validation {metric}" + (" (%)" if percent else ""))
    if log:
        panels[0].set_yscale("log")
    lines_of_runs, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        lines_of_runs, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(3, len(labels))
    )
    if len({r["seed"] for r in results}) > 1:
        panels[0].set_title("line: mean of the seeds, band: from the lowest to the highest", fontsize=8)
    for panel, name in zip(panels[2:], guided, strict=False):
        runs = [r for r in results if r["run"] == name]
        _similarities(panel, runs, label_of(runs[0]))
    if has_gradients:
        _angles(panels[-1], results, colours)
    for panel in panels:
        _tidy(panel)
    save(figure, path)


def plot_run(history: History, path: str | os.PathLike[str], measure: str | None = None) -> bool:
    """Draw what a single run logged and save the figure, with its first validation metric: see `plot_curves`.

    Args:
        history: `log_history` of a trainer's state.
        path: Where to save the figure; the suffix decides the format.
        measure: Name of the similarity measure, for the axis label.

    Returns:
        Whether there was anything to draw.
    """
    metric, curve = validation_curve(history)
    run: Curves = {
        "curve": curve,
        "training": training_curve(history),
        "similarity": similarity_curves(history),
        "debiased": debiased_curve(history),
    }
    run["settings"] = {"guidance": {"measure": measure or "similarity"}}
    return plot_curves(run, metric, path)


def plot_curves(run: Curves, metric: str | None, path: str | os.PathLike[str]) -> bool:
    """Draw the curves of a single run and save the figure: task loss, validation metric, similarity of every pair.

    Args:
        run: Record of the run, from `comparison.carry_out`.
        metric: Name of the validation metric; None if there is none.
        path: Where to save the figure; the suffix decides the format.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    curve = run["curve"]
    draw = {"loss": bool(run["training"] or curve), "metric": bool(metric and curve), "pairs": bool(run["similarity"])}
    shown = [name for name, there in draw.items() if there]
    if not shown:
        return False
    figure = Figure(figsize=(4.6 * len(shown), 3.8), layout="constrained")
    panels = dict(zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True))
    if panel := panels.get("loss"):
        _losses(panel, [run], "C0")
        panel.set(xlabel="optimizer step", ylabel="task loss" if curve else "task loss in training")
        panel.set_title("dashed: training, solid: validation" if curve else "", fontsize=8)
    if panel := panels.get("metric"):
        panel.plot([p["step"] for p in curve], [p["value"] for p in curve], color="C0", marker=".")
        panel.set(xlabel="optimizer step", ylabel=f"validation {str(metric).replace('_', ' ')}")
    if panel := panels.get("pairs"):
        _similarities(panel, [run], "similarity of the pairs")
    for panel in panels.values():
        _tidy(panel)
    save(figure, path)
    return True


def _tidy(panel: Axes) -> None:
    """Leave two of the frame's lines, whole steps, and plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.get_yscale() != "log":
        return
    low, high = panel.get_ylim()
    if high < SHORT * low:  # powers of ten and their multiples are too far apart
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    else:
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_minor_locator(LogLocator(subs=()))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _curve(panel: Axes, runs: Sequence[Curves], color: str, factor: float) -> None:
    by_step = _by_step(runs, "curve", "value")
    steps = list(by_step)
    means = [statistics.fmean(by_step[s]) * factor for s in steps]
    panel.plot(steps, means, marker=_marker(steps), color=color, label=label_of(runs[0]))
    if len(runs) > 1:
        lows, highs = [min(by_step[s]) * factor for s in steps], [max(by_step[s]) * factor for s in steps]
        panel.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)


def _losses(panel: Axes, runs: Sequence[Curves], color: str) -> None:
    styles: dict[Points, str] = {"curve": "-", "training": "--"}
    for points, style in styles.items():
        by_step = _by_step(runs, points, "loss")
        means = [statistics.fmean(values) for values in by_step.values()]
        panel.plot(list(by_step), means, style, marker=_marker(by_step), color=color, linewidth=1.0)


def _angles(panel: Axes, results: Sequence[Curves], colours: Mapping[str, str]) -> None:
    """Draw the cosine of the two gradients of each run, as a mean over its seeds."""
    panel.axhline(0, color="0.7", linewidth=0.8)
    for name, colour in colours.items():
        runs = [r for r in results if r["run"] == name and r.get("gradients")]
        if runs:
            values = _by_step(runs, "gradients", "cosine")
            panel.plot(list(values), [statistics.fmean(v) for v in values.values()], color=colour, marker=".")
    panel.set(xlabel="optimizer step", ylabel="cosine: guidance's and task's gradient")


def _marker(points: Sized) -> str | None:
    """Return a dot for a curve of one point, which has no line."""
    return "." if len(points) == 1 else None


def _by_step(runs: Sequence[Curves], points: Points, name: str) -> dict[int, list[float]]:
    """Return step → values of the runs, at the steps that all runs have."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for point in run.get(points, []):
            if name in point:  # with LayerDrop a pair may be missing from some logs
                by_step.setdefault(point["step"], []).append(point[name])
    return {step: by_step[step] for step in sorted(by_step) if len(by_step[step]) == len(runs)}


def _similarities(panel: Axes, runs: Sequence[Curves], title: str) -> None:
    """Draw the similarity of each pair, and the mean of debiased CKA where it was logged beside another measure."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    pairs = list(dict.fromkeys(key for run in runs for point in run["similarity"] for key in point if key != "step"))
    for number, pair in enumerate(pairs):
        by_step = _by_step(runs, "similarity", pair)
        color = colormaps["viridis"](number / max(1, len(pairs) - 1))
        label = pair.replace("~", " ~ ")
        _similarity(panel, by_step, color=color, label=label, linewidth=1.2)
    if debiased := _by_step(runs, "debiased", "value"):
        _similarity(panel, debiased, color="k", linestyle="--", label="debiased CKA, mean", linewidth=1.2)
    measure = measure_in_words(runs[0]["settings"]["guidance"]["measure"])
    panel.set(xlabel="optimizer step", ylabel=measure, ylim=(LOWEST - 0.03, HIGHEST + 0.03))
    panel.set_title(title, fontsize=9)
    assert panel.figure is not None
    if len(pairs) > MANY_PAIRS:
        bar = panel.figure.colorbar(ScalarMappable(cmap="viridis"), ax=panel, ticks=[0, 1], pad=0.02)
        bar.ax.set_yticklabels([f"first of\n{len(pairs)} pairs", "last"], fontsize=7)
    handles, labels = panel.get_legend_handles_labels()
    shown = [i for i, label in enumerate(labels) if len(pairs) <= MANY_PAIRS or "debiased" in label]
    if shown:
        head = "target ~ guide layer" if len(pairs) <= MANY_PAIRS else None
        place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
        words: Any = {"frameon": False, "fontsize": 7, "title": head, "title_fontsize": 7}
        panel.legend([handles[i] for i in shown], [labels[i] for i in shown], **place, **words)


def _similarity(panel: Axes, by_step: Mapping[int, Sequence[float]], **style: Any) -> None:
    """Draw means over the seeds. The lowest one below the panel is marked at its edge with its value."""
    means = {step: statistics.fmean(values) for step, values in by_step.items()}
    panel.plot(list(means), list(means.values()), marker=_marker(means), **style)
    below = {step: value for step, value in means.items() if value < LOWEST}
    if below:
        step = min(below, key=below.__getitem__)
        panel.plot([step], [LOWEST], marker="v", color=style["color"], markersize=5, clip_on=False)
        panel.annotate(f"{below[step]:.2g}", (step, LOWEST), (3, 3), textcoords="offset points", fontsize=6)
