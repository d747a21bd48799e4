"""The micro-batches of an optimizer step: watched one by one, or known beforehand where they are compared together."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from hf_guidance.config import GuidanceConfig
from hf_guidance.features.batch import Batch
from hf_guidance.features.inside import transformer_in
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.schedule import Schedule
from hf_guidance.trainer.accumulation import Accumulated
from hf_guidance.trainer.forwards import watch_each
from hf_guidance.trainer.steps import is_last_before_log

if TYPE_CHECKING:
    Behind = Trainer
else:
    Behind = object


class MicroBatchesMixin(Behind):
    """The part of `GuidanceMixin` that watches the target's forward on each micro-batch."""

    guide: Any
    guidance: GuidanceConfig
    takes_first_look = True

    if TYPE_CHECKING:
        guide_identity: dict[str, Any]
        resumed: bool

        @property
        def guidance_loss(self) -> GuidanceLoss: ...

        def _schedule(self) -> Schedule: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_step = (-1, 0)  # (optimizer step, micro-steps seen in it)
        self._batches: list[dict[str, Any]] = []
        self._window: Accumulated | None = None
        self._in_window = 0  # number of its micro-batches that have been trained on
        self._in_wrappers: tuple[Any, Any] = (None, None)  # the model, and the same without wrappers
        self._look_is_due = False  # from the start of a run to its first guided batch
        self._rows: float | None = None  # for rows compared by themselves, their mean number in a micro-batch
        super().__init__(*args, **kwargs)

    def _watch(self, inputs: Batch) -> AbstractContextManager[Watched]:
        step, seen = self._micro_step
        self._micro_step = (self.state.global_step, seen + 1 if step == self.state.global_step else 0)
        step, micro_step = self._micro_step
        rank, log, weights = self.accelerator.process_index, is_last_before_log(self, step), self._schedule()(step)
        due = self._look_is_due and (step == 0 or self.args.world_size == 1)  # all processes look together
        self.guidance_loss.keeps_layers = due and self.takes_first_look and self.is_in_train and micro_step == 0
        if self.guidance.similarity_batch == "accumulated":
            if self._window is None:
                batches = [self._prepare_inputs(batch) for batch in self._batches]
                popped = ("labels",) if self.label_smoother is not None or self.compute_loss_func is not None else ()
                place: dict[str, Any] = {"step": step, "rank": rank, "weights": weights}
                self._window = Accumulated(self.guidance_loss, batches, **place, leave_out=popped)
            number, self._in_window = self._in_window, self._in_window + 1
            return self._window.watch(number, log=log)
        return self._watching(inputs, step=step, micro_step=micro_step, rank=rank, log=log, weights=weights)

    def _watching(self, inputs: Batch, **place: Any) -> AbstractContextManager[Watched]:
        whole, target = self._networks()
        watch = self.guidance_loss.watch if whole is target else partial(watch_each, self.guidance_loss)
        return watch(inputs, **place)

    def _guidance_target(self) -> Any:
        """Return the network in the model whose layers are read."""
        return self._networks()[1]

    def _networks(self) -> tuple[Any, Any]:
        """Return the model without its wrappers, and the network in it whose layers are read."""
        if self._in_wrappers[0] is not self.model:  # accelerate walks all modules
            self._in_wrappers = self.model, self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        whole = self._in_wrappers[1]
        return whole, transformer_in(whole)  # which may have been replaced

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of the coming optimizer step as transformers does, and keep them."""
        found = super().get_batch_samples(*args, **kwargs)
        self._batches, self._window, self._in_window = found[0], None, 0  # so that only one window is in memory
        self._rows = self._rows_of_step() if self.guide is not None and self.guidance.sample_axis == "within" else None
        return found

    def _forget_batches(self) -> None:
        self._batches, self._window = [], None

    def _rows_of_step(self) -> float | None:
        """Return the mean number of rows that a micro-batch of this step compares by themselves, over all processes."""
        step, rank = self.state.global_step, self.accelerator.process_index
        if not self._schedule()(step).guidance:
            return None
        place = {"step": step, "rank": rank}
        rows = [self.guidance_loss.rows_to_compare(b, micro_step=i, **place) for i, b in enumerate(self._batches)]
        mean = torch.tensor(sum(rows) / max(1, len(rows)), device=self.accelerator.device)
        return float(self.accelerator.reduce(mean, reduction="mean"))
