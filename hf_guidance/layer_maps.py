"""Similarity of every target layer with every guide layer, before a trainer's training and after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from hf_guidance.analysis.heat_maps import similarity_map
from hf_guidance.preparation import first_batches
from hf_guidance.sharding import is_sharded
from hf_guidance.similarity import get_measure


class LayerMaps:
    """Maps on one batch, which is kept at hand.

    Args:
        batch: collated, on any device; of as many samples as the measure needs.

    Attributes:
        maps: ``before`` and ``after``, as `similarity_map` gives them.
    """

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch
        self.maps: dict[str, dict[str, Any]] = {}

    def look(self, trainer: Any, when: str) -> None:
        """Make one of the two maps, of the target as it is now."""
        target = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).to(trainer.args.device)
        batch = trainer._prepare_inputs(self.batch)
        autocast = trainer.accelerator.autocast()
        self.maps[when] = similarity_map(target, trainer.guide, trainer.guidance, batch, autocast=autocast)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.maps), encoding="utf-8")

    def load(self, path: Path) -> None:
        self.maps = json.loads(path.read_text(encoding="utf-8"))


def can_map(trainer: Any) -> bool:
    """Whether there is guidance, and the first process can run target and guide whole and alone."""
    if trainer.guide is None or not trainer.guidance.guidance_weight or is_sharded(trainer.guide):
        return False
    alone = trainer.args.world_size == 1 or not any(isinstance(m, nn.SyncBatchNorm) for m in trainer.model.modules())
    return alone and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled


def maps_of(trainer: Any) -> LayerMaps | None:
    """Maps on the first batch to validate with, or else to train on; None where it is too small, or of a stream.

    A stream is not touched: it may not begin anew.
    """
    rows = next((rows for rows in (trainer.eval_dataset, trainer.train_dataset) if _has_places(rows)), None)
    batch = None if rows is None else next(first_batches(trainer, rows), None)
    if batch is None or len(next(iter(batch.values()))) < get_measure(trainer.guidance.measure).min_samples:
        return None
    return LayerMaps(batch)


def _has_places(rows: Any) -> bool:
    return hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, dict)
