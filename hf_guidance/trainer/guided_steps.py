"""Counts of guided steps: the first unguided step gives a warning, and a run without any guided step raises."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_guidance.loss import Watched
from hf_guidance.schedule import Schedule

logger = logging.getLogger(__name__)

NEVER = (
    "GuidanceMixin.compute_loss was not called in training mode (does a subclass override compute_loss or "
    "training_step without super(), or put the model in evaluation mode?)"
)


class GuidedSteps(TrainerCallback):
    """A callback that counts the optimizer steps that were guided.

    Args:
        check: Raises ValueError if guidance would not do what its settings say. It is called when training begins,
            because settings may change after construction, as in a hyperparameter search. The trainer also prepares
            its guide there.
        schedule: Returns the function optimizer step → weights of guidance and task.
        is_left_out: Returns whether the present optimizer step is left out because it is not finite.

    Attributes:
        before: Guided steps of the run before this call of `train`; None if unknown.
        guided: Guided steps of this call.
    """

    def __init__(
        self, check: Callable[[], None], schedule: Callable[[], Schedule], is_left_out: Callable[[], bool]
    ) -> None:
        self.check, self.schedule, self.is_left_out = check, schedule, is_left_out
        self.before: int | None = 0
        self.first, self.guided, self._pending = 0, 0, False
        self._reasons: dict[str, str] = {}  # first word → reason

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reset the counts, and check the settings again."""
        self.first, self.guided, self._reasons = state.global_step, 0, {}
        self.check()
        if not self.schedule()(state.max_steps - 1).task:
            logger.warning(
                "All %d optimizer steps are pre-alignment, none is of the task: see prealign_steps.", state.max_steps
            )

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._pending = False

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.guided += self._pending and not self.is_left_out()

    def note(self, watched: Watched, step: int) -> None:
        """Record a watched forward. Warn, once per reason, if it should have been guided and was not."""
        if watched.loss is not None:
            self._pending = True
        elif watched.weights.guidance and (kind := watched.why_unguided.partition(" ")[0]) not in self._reasons:
            self._reasons[kind] = watched.why_unguided
            logger.warning(
                "Optimizer step %d is not guided: %s. Others like it are counted in guidance/skipped_batches.",
                step + 1,
                watched.why_unguided,
            )

    def total(self) -> int | None:
        """Return the guided steps of the run, before a resume too; None if those are unknown."""
        return None if self.before is None else self.before + self.guided

    def check_any(self, state: TrainerState, keep: Callable[[], Any], folder: str) -> None:
        """Compare the steps that were guided, on any process, with those that should have been.

        If some but not all of them were guided, it warns.

        Args:
            state: State of the trainer after training.
            keep: Saves the model before an error is raised.
            folder: Where the model is saved.

        Raises:
            RuntimeError: If no step of the run was guided.
        """
        counts: list[tuple[int | None, int]] = gather_object([(self.total(), self.guided)])
        weights = self.schedule()
        asked = [step for step in range(state.global_step) if weights(step).guidance]
        if asked and all(total == 0 for total, _ in counts):
            keep()
            raise RuntimeError(
                f"No optimizer step of {state.global_step} was guided: {'; '.join(self._reasons.values()) or NEVER}. "
                f"The network was trained on its task alone, and is in {folder}. To train without guidance, set "
                "guidance_weight=0."
            )
        here, guided = sum(step >= self.first for step in asked), max(guided for _, guided in counts)
        if guided < here:
            logger.warning("Only %d of the %d optimizer steps that should have been guided were.", guided, here)
