"""The end of guidance once the similarity is high enough."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    Behind = Trainer
else:
    Behind = object

logger = logging.getLogger(__name__)

DECIDE_EVERY = 20  # optimizer steps between two decisions, each of which waits for the device and for the other ranks


class SimilarityStop(TrainerCallback, ExportableState):
    """A callback that ends guidance for good when the mean similarity reaches a threshold.

    The mean is over all pairs, micro-steps and ranks since the last decision, weighted by the rows that are compared by
    themselves. Its sum stays on the device until the
    next decision or checkpoint. A checkpoint holds it, so that a resumed run stops at the same step.

    Args:
        threshold: Mean similarity at which guidance stops.

    Attributes:
        stopped_at: Optimizer steps taken when guidance stopped; None while it has not.
        is_logged: Whether a log has told that step.
        total: Sum of the similarities since the last decision, as far as it is reduced over the ranks.
        count: Number of its terms, or of their rows.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._reset()

    def _reset(self) -> None:
        self.stopped_at: int | None = None
        self.is_logged = False
        self.total, self.count = 0.0, 0.0
        # means over the pairs and their rows, of the micro-steps of the present optimizer step
        self._present: list[tuple[Tensor, int]] = []
        self._taken: list[tuple[Tensor, int]] = []  # of the optimizer steps that were taken, and are not yet in `total`

    def note(self, similarities: Collection[Tensor], rows: int = 1) -> None:
        """Remember the similarities of all pairs at a micro-step.

        Args:
            similarities: One scalar for each pair.
            rows: Their weight, as `Watched.rows`.
        """
        if self.stopped_at is None and similarities:
            self._present.append((torch.stack(list(similarities)).float().mean(), rows))

    def take(self) -> None:
        """Count the micro-steps of the present optimizer step, which is taken and not left out."""
        self._taken += self._present
        self._present = []

    def settle(self, device: torch.device) -> None:
        """Add the sums of all ranks to `total` and `count`. All ranks must call it together."""
        own = torch.tensor([0.0, float(sum(rows for _, rows in self._taken))], device=device)
        if self._taken:
            own[0] = torch.stack([mean * rows for mean, rows in self._taken]).sum()
        total, count = reduce(own, reduction="sum").tolist()
        self.total, self.count, self._taken = self.total + total, self.count + count, []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Start anew, or from the checkpoint that the run resumes from."""
        self._reset()
        callbacks: Any = state.stateful_callbacks  # annotated as a list, and is a dict
        saved = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        if state.max_steps < DECIDE_EVERY and state.is_world_process_zero:
            logger.warning(
                "guidance_stop_similarity is decided every %d optimizer steps, and the run has %d: guidance will not "
                "stop.",
                DECIDE_EVERY,
                state.max_steps,
            )

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self._present = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide, every `DECIDE_EVERY` optimizer steps, unless no step was guided since the last decision."""
        if self.stopped_at is not None or state.global_step % DECIDE_EVERY:
            return
        self.settle(args.device)
        if self.count and (mean := self.total / self.count) >= self.threshold:
            self.stopped_at = state.global_step
            if state.is_world_process_zero:
                logger.info(
                    "Guidance stops at step %d: the mean similarity is %.4f, and guidance_stop_similarity is %g.",
                    self.stopped_at,
                    mean,
                    self.threshold,
                )
        self.total, self.count = 0.0, 0.0

    def to_log(self) -> dict[str, float]:
        """Return, once, the step at which guidance stopped."""
        if self.stopped_at is None or self.is_logged:
            return {}
        self.is_logged = True
        return {"guidance/stopped_at_step": self.stopped_at}

    def state(self) -> dict[str, Any]:
        names = ("stopped_at", "is_logged", "total", "count")
        return {"args": {"threshold": self.threshold}, "attributes": {name: getattr(self, name) for name in names}}


def stop_among(callbacks: Sequence[TrainerCallback]) -> SimilarityStop | None:
    """Return the callback that stops guidance; None if there is none.

    Ask for it once training has begun: before, Trainer may replace it as it resumes
    (`restore_callback_states_from_checkpoint`).
    """
    return next((callback for callback in callbacks if isinstance(callback, SimilarityStop)), None)


class StoppingMixin(Behind):
    """The part of `GuidanceMixin` that stops guidance for `guidance_stop_similarity`."""

    _stop: SimilarityStop | None = None

    def _find_stop(self) -> None:
        """Find the callback that stops guidance, at the beginning of training."""
        self._stop = stop_among(self.callback_handler.callbacks)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._stop is not None:
            self._stop.settle(self.args.device)  # on all ranks, as only one of them writes the state
        super()._save_checkpoint(model, trial)
