"""Similarity of every target layer with every guide layer, before and after training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_guidance.analysis.history import SimilarityMap
from hf_guidance.analysis.similarity_map import similarity_map
from hf_guidance.guide.sharding import is_sharded
from hf_guidance.similarity.registry import min_samples
from hf_guidance.trainer.forwards import watches_each
from hf_guidance.trainer.preparation import first_batches
from hf_guidance.trainer.protocol import GuidedTrainer


class LayerMaps:
    """Maps of all layer similarities on one batch.

    Args:
        batch: A collated batch on any device, with at least as many samples as the measure needs.

    Attributes:
        maps: `before` and `after`, each as `similarity_map` returns it.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self.maps: dict[str, SimilarityMap] = {}

    def compute(self, trainer: GuidedTrainer, when: str) -> None:
        """Compute one of the two maps for the target as it is now.

        Args:
            trainer: The trainer that holds target, guide and settings.
            when: `before` or `after`.
        """
        target = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).to(trainer.args.device)
        batch = trainer._prepare_inputs(self.batch)
        autocast = trainer.accelerator.autocast()
        self.maps[when] = similarity_map(target, trainer.guide, trainer.guidance, batch, autocast=autocast)


class KeptMap(TrainerCallback, ExportableState):
    """A callback that keeps the map from before training in the checkpoints of its run."""

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
    """Tell whether the run is guided and its first process can run target and guide without the others."""
    if trainer.guide is None or not trainer.guidance.guidance_weight or is_sharded(trainer.guide):
        return False
    if watches_each(trainer):  # no batch of one forward is known
        return False
    alone = trainer.args.world_size == 1 or not any(isinstance(m, nn.SyncBatchNorm) for m in trainer.model.modules())
    return alone and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled


def maps_of(trainer: GuidedTrainer) -> LayerMaps | None:
    """Prepare maps on the first validation batch; return None if there is none or it is too small.

    A stream is not read, because it may not start again. Training data are not read either, because their rows may
    count how often they are read.
    """
    rows = trainer.eval_dataset
    if isinstance(rows, dict):
        rows = next(iter(rows.values()), None)
    has_places = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    batch = next(first_batches(trainer, rows), None) if has_places else None
    if batch is None or len(next(iter(batch.values()))) < min_samples(trainer.guidance.measure):
        return None
    return LayerMaps(batch)
