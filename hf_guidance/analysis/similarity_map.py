"""Similarity of every target layer with every guide layer, computed on one batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.analysis.history import SimilarityMap
from hf_guidance.config import HIDDEN_STATES, GuidanceConfig
from hf_guidance.guide.freezing import BATCH_NORM, freeze
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.mapping import pair_name


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
        config.alone().resolved(),
        guidance_weight=1.0,
        guidance_schedule="constant",
        guidance_stop_step=None,
        log_measures=[],
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
