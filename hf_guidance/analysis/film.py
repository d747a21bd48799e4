"""Similarity maps over training, drawn as a film or as panels side by side."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.heat_maps import draw_similarity_map
from hf_guidance.analysis.history import SimilarityMap, measure_in_words

PANELS = 4  # of a figure that does not move
PER_SECOND = 4  # frames of a film
PAUSE = 6  # frames for which a film stands still at its end


def plot_film(frames: Mapping[int, SimilarityMap], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw similarity maps over training, and save them.

    Args:
        frames: Optimizer step → map, as `similarity_map` returns it; at least one.
        path: Where to save the figure. A `.gif` shows one map after the other. In any other format up to four
            maps, evenly spread over training, stand side by side.
        title: Words above each map, such as the name of the run.

    Raises:
        ValueError: If there is no map.
    """
    if not frames:
        raise ValueError("there is no similarity map to draw: frames is empty.")
    if Path(path).suffix == ".gif":
        _save_film(frames, path, title)
    else:
        _save_panels(frames, path, title)


def _save_film(frames: Mapping[int, SimilarityMap], path: str | os.PathLike[str], title: str) -> None:
    from matplotlib.animation import PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    writer = PillowWriter(fps=PER_SECOND)
    with writer.saving(figure, str(path), dpi=100):
        for number, step in enumerate(sorted(frames)):
            figure.clear()
            panel = figure.subplots()
            image = draw_similarity_map(panel, frames[step])
            panel.set_title(_words(title, step, frames[step]), fontsize=9)
            figure.colorbar(image, ax=panel, label=measure_in_words(frames[step]["measure"]), shrink=0.9)
            for _ in range(PAUSE if number == len(frames) - 1 else 1):
                writer.grab_frame()


def _save_panels(frames: Mapping[int, SimilarityMap], path: str | os.PathLike[str], title: str) -> None:
    from matplotlib.figure import Figure

    steps = sorted(frames)
    count = min(PANELS, len(steps))
    chosen = [steps[round(place * (len(steps) - 1) / max(1, count - 1))] for place in range(count)]
    figure = Figure(figsize=(1.2 + 3.0 * count, 3.3), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, step in zip(panels, chosen, strict=True):
        image = draw_similarity_map(panel, frames[step])
        panel.set_title(_words(title, step, frames[step]), fontsize=8)
    figure.colorbar(image, ax=list(panels), label=measure_in_words(frames[chosen[0]]["measure"]), shrink=0.9)
    save(figure, path)


def _words(title: str, step: int, found: SimilarityMap) -> str:
    mean = statistics.fmean(_of_pairs(found))
    return (f"{title}\n" if title else "") + f"step {step}, mean of the pairs {mean:.2f}"


def _of_pairs(found: SimilarityMap) -> list[float]:
    rows, columns = found["target_layers"], found["guide_layers"]
    places = [pair.split("~") for pair in found["pairs"]]
    return [found["similarity"][rows.index(target)][columns.index(guide)] for target, guide in places]
