"""A run that was asked to be guided and is not says so: at the first such step, and by an error if none was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from hf_guidance.loss import Watched
from hf_guidance.schedule import Weights

logger = logging.getLogger(__name__)

NEVER = "the trainer asked for no loss of a batch while the model was in training mode"


class GuidedSteps(TrainerCallback):
    """Counts what was guided in one call of `train`.

    Args:
        check: raises ValueError for settings under which guidance would not be what it says; called when training
            begins, as settings may have changed since the trainer was made (a hyperparameter search does that).
        weights: optimizer step → weights of guidance and task.
    """

    def __init__(self, check: Callable[[], None], weights: Callable[[int], Weights]) -> None:
        self.check, self.weights = check, weights
        self.first, self.guided, self.why = 0, 0, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the call before, and check the settings once more."""
        self.first, self.guided, self.why = state.global_step, 0, ""
        self.check()

    def note(self, watched: Watched, step: int) -> None:
        """Count a watched forward; warn of the first that should have been guided and was not."""
        if watched.loss is not None:
            self.guided += 1
        elif watched.weights.guidance and not self.why:
            self.why = watched.why_unguided
            logger.warning(
                "Optimizer step %d is not guided: %s. Others like it are counted in guidance/skipped_batches.",
                step + 1,
                self.why,
            )

    def check_any(self, state: Any, keep: Callable[[], Any], folder: str) -> None:
        """Raise RuntimeError if no step of the run was guided on any process, though some should have been.

        Args:
            state: the trainer's, after training.
            keep: saves the model, before anything is raised.
            folder: where that is.
        """
        if sum(gather_object([self.guided])) or any(
            "guidance/loss" in log for log in state.log_history
        ):  # of a part before a resume
            return
        steps = range(self.first, state.global_step)
        if any(self.weights(step).guidance for step in steps):
            keep()
            raise RuntimeError(
                f"None of the {len(steps)} optimizer steps was guided: {self.why or NEVER}. The network was trained on "
                f"its task alone, and is in {folder}. For training without guidance set guidance_weight=0."
            )
