"""Similarities on validation data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_guidance.config import GuidanceConfig
from hf_guidance.features.batch import Batch
from hf_guidance.features.rows import content_of
from hf_guidance.guide.forward import without_guide
from hf_guidance.guide.random_state import random_state, set_random_state
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.schedule import Weights
from hf_guidance.trainer.forwards import watches_each
from hf_guidance.trainer.steps import RunningMeans

if TYPE_CHECKING:
    Behind = Trainer
else:
    Behind = object

logger = logging.getLogger(__name__)

MEASURING = Weights(guidance=1.0, task=1.0)  # whatever the weights of the step are


class SimilarityMeans:
    """Means of the similarities on the batches of one evaluation, weighted by rows.

    Args:
        measure: The measure trained on.
    """

    def __init__(self, measure: str) -> None:
        self.measure, self.batches = measure, 0
        self._sums, self._why_not = RunningMeans(), ""

    def add(self, watched: Watched, rows: int) -> None:
        """Add the similarities of a batch; leave out a batch that is too small for the measure."""
        self.batches += 1
        self._why_not = watched.why_unguided
        for measure, similarities in watched.similarities.items():
            group = "similarity" if measure == self.measure else measure
            for pair, value in similarities.items():
                self._sums.add(f"guidance/{group}/{pair}", rows * value, rows)
        if values := list(watched.similarities.get(self.measure, {}).values()):
            self._sums.add("guidance/similarity", rows * torch.stack(values).mean(), rows)

    def why_nothing(self) -> str:
        """Explain why no batch could be measured, and what to do about it."""
        if not self.batches:
            return "GuidanceMixin.prediction_step was not called (does a subclass override it without super()?)."
        if "per_device_train_batch_size" not in self._why_not:
            return f"{self._why_not}."
        return f"{self._why_not.partition(': ')[0]}. Raise per_device_eval_batch_size."

    def over_ranks(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over the batches of all ranks, which must call it together."""
        return self._sums.drain(accelerator)


class EvaluationMixin(Behind):
    """The part of `GuidanceMixin` that evaluates: without the guide, or with its similarities if asked for."""

    guide: Any
    guidance: GuidanceConfig

    if TYPE_CHECKING:

        @property
        def guidance_loss(self) -> GuidanceLoss: ...

        def _calibrate_once(self) -> None: ...

        def _let_go(self) -> None: ...

        def _watching(self, inputs: Batch, **place: Any) -> AbstractContextManager[Watched]: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._measured: SimilarityMeans | None = None  # while an evaluation measures
        self._warned_of: set[str] = set()  # prefixes of metrics
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers does, and add the similarities to the metrics if `eval_similarity` is set."""
        given = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.guide is None or not self.guidance.eval_similarity:
            return super().evaluation_loop(*given)
        self._calibrate_once()
        measured = self._measured = SimilarityMeans(self.guidance.measure)
        try:
            found = super().evaluation_loop(*given)
        finally:
            self._measured = None
            if not self.is_in_train:
                self._let_go()
        means = measured.over_ranks(self.accelerator)
        assert found.metrics is not None
        found.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        if not means and self.is_world_process_zero() and metric_key_prefix not in self._warned_of:
            self._warned_of.add(metric_key_prefix)
            logger.warning("No similarity was measured on the %s data: %s", metric_key_prefix, measured.why_nothing())
        return found

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on one batch without the guide's columns, and measure its similarities before, if asked for."""
        if self._measured is not None:
            self._measure(self._measured, model, self._prepare_inputs(dict(inputs)))
        return super().prediction_step(model, self._for_target(inputs), *args, **kwargs)

    @torch.no_grad()
    def _measure(self, measured: SimilarityMeans, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run both networks once more on a batch. The random state of training does not change."""
        rank, before = self.accelerator.process_index, random_state()
        options: dict[str, Any] = {"micro_step": measured.batches, "rank": rank, "weights": MEASURING}
        try:
            with self.compute_loss_context_manager(), self._watching(inputs, **options) as watched:
                self._run_target(model, watched.inputs)
        finally:
            set_random_state(before)
        within = self.guidance.sample_axis == "within"
        measured.add(watched, rows=watched.rows if within else content_of(inputs).shape[0])

    def _run_target(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run the target as the Trainer does to compute a loss; without labels, call it."""
        own: Any = self
        has_labels = all(inputs.get(name) is not None for name in self.label_names)
        if watches_each(own) or (has_labels and (self.label_names or self.can_return_loss)):
            super().compute_loss(model, inputs)
        else:
            model(**inputs)

    def _for_target(self, inputs: Any) -> Any:
        if not isinstance(inputs, Mapping):  # rows from which a Trainer makes its batch, as one that generates does
            return inputs
        return without_guide(inputs, self.guidance.sample_id_column)
