"""Heat maps: the similarity of every target layer with every guide layer, and small matrices with their values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.history import Curves, SimilarityMap, measure_in_words
from hf_guidance.analysis.runs import label_of
from hf_guidance.analysis.similarity_map import similarity_map as similarity_map  # earlier code has it from here

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_LAYERS = 12  # above this, an axis names only some of the layers
LONGEST_NAME = 16  # of a layer, beside its tick
NUMBERED = 8  # layers, up to which the two maps of a run have numbers in their cells
LIMITS = (-0.2, 1.0)  # of the colours, in every map


def plot_similarity_maps(results: Sequence[Curves], path: str | os.PathLike[str]) -> bool:
    """Draw the maps of each guided run before and after training, for its first seed, and save the figure.

    Args:
        results: Records of the runs, from `comparison.carry_out`. A record may hold `when`, the titles of its two maps.
        path: Where to save the figure; the suffix decides the format.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    runs = list({r["run"]: r for r in reversed(results) if r.get("similarity_maps")}.values())[::-1]
    if not runs:
        return False
    figure = Figure(figsize=(7.2, 3.1 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 2, squeeze=False)
    for line, run in zip(panels, runs, strict=True):
        name = label_of(run)
        titles = run.get("when") or [f"{name}, {when} training" for when in ("before", "after")]
        for panel, when, title in zip(line, ("before", "after"), titles, strict=True):
            image = draw_similarity_map(panel, run["similarity_maps"][when])
            panel.set_title(title, fontsize=9)
        measure = measure_in_words(run["similarity_maps"]["after"]["measure"])
        figure.colorbar(image, ax=list(line), label=measure, shrink=0.9)
    save(figure, path)
    return True


def draw_map(
    panel: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    titles: tuple[str, str] = ("target layer", "guide layer"),
    small: bool = True,
) -> Any:
    """Draw similarities as an image from −0.2 to 1, with the numbers in its cells if there are few and room for them.

    A value outside these limits is written in its cell in any case. Layers with long names have numbers, of which the
    title of the axis explains the first and the last.

    Args:
        panel: Where to draw.
        values: A line for each of `rows`; NaN leaves a cell grey.
        rows: Names of the layers that go upwards.
        columns: Names of the layers that go to the right.
        titles: What the rows and the columns are.
        small: Whether a cell of a small map is wide enough for its number.

    Returns:
        The image, for a colour bar.
    """
    low, high = LIMITS
    numbers = np.array(values, dtype=float)
    panel.set_facecolor("0.85")
    image = panel.imshow(numbers, vmin=low, vmax=high, cmap="viridis", aspect="auto", origin="lower")
    few = small and max(numbers.shape) <= FEW_LAYERS
    for (i, j), value in np.ndenumerate(numbers):
        if np.isfinite(value) and (few or not low - 0.005 <= value <= high + 0.005):
            is_dark = value < low + 0.6 * (high - low)
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if is_dark else "k", fontsize=6)
    axes: Any = (panel.set_yticks, panel.set_ylabel, rows), (panel.set_xticks, panel.set_xlabel, columns)
    for (set_ticks, set_label, layers), title in zip(axes, titles, strict=True):
        every = -(-len(layers) // FEW_LAYERS)
        names = list(layers)
        if max(map(len, names)) > LONGEST_NAME and len(names) > 1:
            title += f"\n1: {names[0]}\n{len(names)}: {names[-1]}"
            names = [str(number) for number in range(1, len(names) + 1)]
        set_ticks(range(0, len(layers), every), names[::every], fontsize=6)
        set_label(title, fontsize=8 if "\n" not in title else 6)
    for label in panel.get_xticklabels():
        if not label.get_text().isdigit():
            label.set(rotation=60, horizontalalignment="right", rotation_mode="anchor")
    return image


def draw_similarity_map(panel: Axes, content: SimilarityMap) -> Any:
    """Draw the map of a guided run with its pairs framed, and return the image, for a colour bar."""
    rows, columns = content["target_layers"], content["guide_layers"]
    numbered = max(len(rows), len(columns)) <= NUMBERED
    image = draw_map(panel, content["similarity"], rows, columns, small=numbered)
    places = [pair.split("~") for pair in content["pairs"]]
    own = (
        {"s": 240, "facecolors": "none", "edgecolors": "red"} if numbered else {"s": 9, "c": "white", "edgecolors": "k"}
    )
    x, y = [columns.index(g) for _, g in places], [rows.index(t) for t, _ in places]
    panel.scatter(x, y, linewidths=0.8, marker="s", **own)  # type: ignore[arg-type]
    return image


def plot_matrix(
    values: Sequence[Sequence[float]],
    words: Sequence[Sequence[str]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    path: str | os.PathLike[str],
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a small matrix with words in its cells, and save the figure.

    Args:
        values: Rows of numbers, which give the colours; NaN leaves a cell grey.
        words: Text of each cell.
        rows: Names of the rows.
        columns: Names of the columns.
        label: Label of the colour bar.
        path: Where to save the figure; the suffix decides the format.
        limits: Values at both ends of the colours; None spreads them around 0.
    """
    from matplotlib.figure import Figure

    numbers = np.array(values, dtype=float)
    finite = numbers[np.isfinite(numbers)]
    most = float(np.abs(finite).max()) if finite.any() else 1.0
    low, high = limits or (-most, most)
    figure = Figure(figsize=(3.2 + 1.15 * len(columns), 1.9 + 0.75 * len(rows)), layout="constrained")
    panel = figure.subplots()
    panel.set_facecolor("0.85")
    image = panel.imshow(numbers, vmin=low, vmax=high, cmap="viridis" if limits else "RdBu", aspect="auto")
    for (i, j), value in np.ndenumerate(numbers):
        place = (value - low) / (high - low)
        is_dark = place < 0.6 if limits else abs(place - 0.5) > 0.3
        colour = "white" if is_dark and np.isfinite(value) else "black"
        panel.text(j, i, words[i][j], ha="center", va="center", color=colour, fontsize=8)
    panel.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(image, ax=panel, label=label, shrink=0.9)
    save(figure, path)
