"""Similarity of every target layer with every guide layer, computed and drawn."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.history import Curves, SimilarityMap
from hf_guidance.config import HIDDEN_STATES, GuidanceConfig
from hf_guidance.guide.freezing import BATCH_NORM, freeze
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.mapping import pair_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_LAYERS = 12  # above this, an axis names only some of the layers


@torch.no_grad()
def similarity_map(
    target: nn.Module,
    guide: nn.Module,
    config: GuidanceConfig,
    batch: Mapping[str, Tensor],
    autocast: AbstractContextManager[Any] | None = None,
) -> SimilarityMap:
    """Compute the similarity of every target layer with every guide layer on one batch.

    The target runs as in training but without dropout: batch norm uses the statistics of the batch and keeps none.

    Args:
        target: The network, on the device of the batch; it is not changed.
        guide: The frozen network.
        config: Names layers, measure and sample axis. Its mapping only decides which pairs are marked.
        batch: A collated batch with at least as many samples as the measure needs.
        autocast: Context that sets the precision of both forwards; None means float32.

    Returns:
        `measure`, `target_layers`, `guide_layers`, `similarity` (for each target layer a list with
        one number per guide layer) and `pairs` (as named in the logs).
    """
    config = replace(
        config.alone(), guidance_weight=1.0, guidance_schedule="constant", guidance_stop_step=None, log_measures=[]
    )
    target = copy.deepcopy(target)
    norms = [module for module in target.modules() if isinstance(module, BATCH_NORM)]
    freeze(target, "batch" if norms else "eval")
    with autocast or nullcontext(), torch.random.fork_rng():
        first = GuidanceLoss(target, guide, config)
        _watch(first, batch)
        rows, columns = first.target_reader.names(), first.guide_reader.names()
        names = [[pair_name((row, column)) for column in columns] for row in rows]
        every = [name for row in names for name in row]
        config = replace(config, target_layers=[HIDDEN_STATES], guide_layers=[HIDDEN_STATES], layer_pairs=every)
        similarity = _watch(GuidanceLoss(target, guide, config), batch).similarities[config.measure]
    return {
        "measure": config.measure,
        "target_layers": rows,
        "guide_layers": columns,
        "similarity": [[round(float(similarity[name]), 4) for name in row] for row in names],
        "pairs": [pair_name(pair) for pair in first.pairs or ()],
    }


def _watch(loss: GuidanceLoss, batch: Mapping[str, Tensor]) -> Watched:
    with loss.watch(batch, step=loss.config.prealign_steps) as watched:
        loss.target(**watched.inputs)
    loss.close()
    return watched


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
