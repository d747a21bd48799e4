"""Heat maps of the similarity of every target layer with every guide layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.history import Curves, SimilarityMap
from hf_guidance.analysis.similarity_map import similarity_map as similarity_map  # earlier code has it from here

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_LAYERS = 12  # above this, an axis names only some of the layers


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
        name = run["run"].replace("_", " ")
        titles = run.get("when") or [f"{name}, {when} training" for when in ("before", "after")]
        for panel, when, title in zip(line, ("before", "after"), titles, strict=True):
            image = _draw(panel, run["similarity_maps"][when])
            panel.set_title(title, fontsize=9)
        measure = run["similarity_maps"]["after"]["measure"].replace("_", " ").replace("cka", "CKA")
        figure.colorbar(image, ax=list(line), label=measure, shrink=0.9)
    save(figure, path)
    return True


def _draw(panel: Axes, content: SimilarityMap) -> Any:
    rows, columns = content["target_layers"], content["guide_layers"]
    image = panel.imshow(content["similarity"], vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    places = [pair.split("~") for pair in content["pairs"]]
    panel.scatter([columns.index(g) for _, g in places], [rows.index(t) for t, _ in places], s=5, c="white", marker="s")
    for set_ticks, layers in ((panel.set_xticks, columns), (panel.set_yticks, rows)):
        every = -(-len(layers) // FEW_LAYERS)
        short = [layer.replace("hidden_states.", "h").replace("timm_model.", "") for layer in layers]
        set_ticks(range(0, len(layers), every), short[::every], fontsize=6)
    for label in panel.get_xticklabels():
        label.set(rotation=60, horizontalalignment="right", rotation_mode="anchor")
    panel.set_xlabel("guide layer", fontsize=8)
    panel.set_ylabel("target layer", fontsize=8)
    return image
