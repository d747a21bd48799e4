"""Passes over training data without a length, which Trainer cannot find again when a run resumes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainingArguments

from hf_guidance.trainer.checkpoints import PASS, PASS_BEGAN, STATE, origin_of
from hf_guidance.trainer.checks import splits_batches

if TYPE_CHECKING:
    Behind = Trainer
else:
    Behind = object

logger = logging.getLogger(__name__)


def pass_of(checkpoint: str | Path | None) -> tuple[int, int]:
    """Return the pass over a stream in which a checkpoint was written, from 1, and the step at which it began."""
    origin = {} if checkpoint is None else origin_of(Path(checkpoint))
    return origin.get(PASS, 1), origin.get(PASS_BEGAN, 0)


def warn_of_stream(checkpoint: str | Path, args: TrainingArguments, rows: Any) -> None:
    """Warn if a run resumes in a later pass over a finite stream.

    Trainer skips the rows seen so far within the first pass, which has too few, and then begins another one.

    Args:
        checkpoint: Folder of the checkpoint.
        args: `TrainingArguments` of the run.
        rows: The training data.
    """
    number, began = pass_of(checkpoint)
    if number == 1 or args.ignore_data_skip or hasattr(rows, "__len__"):
        return
    step = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"]
    batch = args.per_device_train_batch_size * (1 if splits_batches(args) else args.world_size)
    logger.warning(
        "%s was written in pass %d over the training data, at row %d. These data have no length, so Trainer cannot go "
        "on from there: it begins a new pass, and the run will end with other weights than an unbroken one. Give the "
        "data a length (__len__), or let the stream have no end.",
        Path(checkpoint).name,
        number,
        (step - began) * args.gradient_accumulation_steps * batch,
    )


class StreamsMixin(Behind):
    """The part of `GuidanceMixin` that counts the passes over a stream."""

    _pass: tuple[int, int] | None = None  # its number, from 1, and the step at which it began; None before the first
    _pass_at_start = (1, 0)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the checkpoint is of the last step: Trainer would then take one step more."""
        if (done := self.state.global_step) >= self.state.max_steps:
            if done > self.state.max_steps:
                logger.warning(
                    "The checkpoint is of step %d, after the last step %d: no step is left.", done, self.state.max_steps
                )
            self.control.should_training_stop = True
            return
        if not hasattr(self.train_dataset, "__len__"):
            self._pass = self._pass_at_start if self._pass is None else (self._pass[0] + 1, done)
        super()._run_epoch(*args, **kwargs)
