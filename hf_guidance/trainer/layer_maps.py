"""Similarity of every target layer with every guide layer, before a trainer's training and after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_guidance.analysis.heat_maps import similarity_map
from hf_guidance.analysis.history import SimilarityMap
from hf_guidance.guide.sharding import is_sharded
from hf_guidance.similarity.measures import get_measure
from hf_guidance.trainer.preparation import first_batches
from hf_guidance.trainer.protocol import GuidedTrainer


class LayerMaps:
    """Maps on one batch, which is kept at hand.

    Args:
        batch: collated, on any device; of as many samples as the measure needs.

    Attributes:
        maps: ``before`` and ``after``, as `similarity_map` gives them.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self.maps: dict[str, SimilarityMap] = {}

    def look(self, trainer: GuidedTrainer, when: str) -> None:
        """Make one of the two maps, of the target as it is now."""
        target = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).to(trainer.args.device)
        batch = trainer._prepare_inputs(self.batch)
        autocast = trainer.accelerator.autocast()
        self.maps[when] = similarity_map(target, trainer.guide, trainer.guidance, batch, autocast=autocast)


class KeptMap(TrainerCallback, ExportableState):
    """The map from before training, in the checkpoints of the run that it is of."""

    def __init__(self) -> None:
        self.before: SimilarityMap | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        callbacks: Any = state.stateful_callbacks  # annotated as a list, and is a dict
        saved = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self.before = (saved[-1] if isinstance(saved, list) else saved)["attributes"]["before"]

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"before": self.before}}


def can_map(trainer: GuidedTrainer) -> bool:
    """Whether there is guidance, and the first process can run target and guide whole and alone."""
    if trainer.guide is None or not trainer.guidance.guidance_weight or is_sharded(trainer.guide):
        return False
    alone = trainer.args.world_size == 1 or not any(isinstance(m, nn.SyncBatchNorm) for m in trainer.model.modules())
    return alone and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled


def maps_of(trainer: GuidedTrainer) -> LayerMaps | None:
    """Maps on the first batch to validate with; None where there is none, or too small a one.

    Neither a stream is touched, which may not begin anew, nor what is trained on, whose rows may count their readings.
    """
    rows = trainer.eval_dataset
    if isinstance(rows, dict):
        rows = next(iter(rows.values()), None)
    has_places = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    batch = next(first_batches(trainer, rows), None) if has_places else None
    if batch is None or len(next(iter(batch.values()))) < get_measure(trainer.guidance.measure).min_samples:
        return None
    return LayerMaps(batch)
