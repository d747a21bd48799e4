"""The optimizer steps of a run: means to log, values that must be finite, and which steps were guided."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_guidance.guide.sharding import gathered
from hf_guidance.loss import Watched
from hf_guidance.schedule import Schedule
from hf_guidance.similarity.pair_loss import Groups
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.stepping_backward import check_may_skip, what_steps_backward

logger = logging.getLogger(__name__)

GRADIENT = "norm of the gradient"
GUIDE_LAYER = "guide layer"
MAX_NAMED = 5  # values in an error
NEVER = (
    "GuidanceMixin.compute_loss was not called in training mode (does a subclass override compute_loss or "
    "training_step without super(), or put the model in evaluation mode?)"
)


class RunningMeans:
    """Means of logged values, kept on the device between two logs so that no step waits for them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything since the last log."""
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Add a scalar with a weight. With weight 0, the logged value is a plain sum."""
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def take(self, other: RunningMeans) -> None:
        """Add the sums of another object."""
        for name, value in other._sums.items():
            self.add(name, value, other._weights[name])

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over micro-steps and ranks since the last call, and reset them.

        Names that were added with weight 0 are plain sums.
        """
        sums = [torch.as_tensor(value, device=accelerator.device).float() for value in self._sums.values()]
        values = torch.stack(sums) if sums else torch.empty(0)
        mine = dict(zip(self._sums, zip(values.tolist(), self._weights.values(), strict=True), strict=True))
        totals: dict[str, tuple[float, float]] = {}
        for rank in gather_object([mine]):  # ranks that skipped different batches hold different names
            for name, (value, weight) in rank.items():
                total, weights = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, weights + weight
        self.clear()
        return {name: value / weight if weight else value for name, (value, weight) in sorted(totals.items())}


def is_last_before_log(trainer: GuidedTrainer, step: int) -> bool:
    """Tell whether a step is the last guided one before a log, so that values only logged are computed just then."""
    args, state = trainer.args, trainer.state
    if args.logging_strategy != IntervalStrategy.STEPS or (args.logging_first_step and step == 0):
        return True
    every = max(1, state.logging_steps)
    logged = (step // every + 1) * every - 1  # the next step that is logged
    return step + trainer.guidance.guidance_every > logged


class FiniteSteps(TrainerCallback):
    """A callback that checks losses, similarities and the gradient norm on all ranks before each optimizer step.

    The values stay on the device until then, at one reduction and one synchronisation per optimizer step. The logs of a
    step are held back as well, so that a step that is left out does not enter the means. Under an optimizer that steps
    inside the backward pass, losses and similarities are checked before each backward pass, at one synchronisation
    each. Gradients are then not checked, and no step can be left out.

    Args:
        accelerator: The accelerator of the trainer.
        logs: Receives the means of every step that is taken.
        skip: Leave the step out instead of stopping.
        on_taken: Called before every step that is taken; None for nothing.

    Attributes:
        sums: Logs of the micro-steps in the present optimizer step.
        left_out: Whether the present optimizer step is left out.
        steps_backward: What takes steps inside the backward pass, in words; empty if nothing does.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        logs: RunningMeans,
        skip: bool,
        on_taken: Callable[[], None] | None = None,
    ) -> None:
        self.accelerator, self.logs, self.skip, self.active = accelerator, logs, skip, False
        self._on_taken = on_taken
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self.steps_backward = ""
        self.reset()

    def reset(self) -> None:
        """Forget the present optimizer step."""
        self.sums, self.left_out = RunningMeans(), False
        self._seen: list[tuple[str, list[str], Tensor]] = []  # (where, names, their values)

    def expect_finite(self, values: Mapping[str, Tensor | float], where: str) -> None:
        """Remember scalars that must be finite.

        Args:
            values: Name in an error → detached scalar.
            where: Place that an error names, such as the micro-step; may be empty.
        """
        if values and self.active:
            device = self.accelerator.device
            # FSDP2's norm is sharded
            found = [gathered(value) if isinstance(value, DTensor) else value for value in values.values()]
            scalars = [torch.as_tensor(value, device=device).float() for value in found]
            self._seen.append((where, list(values), torch.stack(scalars)))

    def on_train_begin(
        self, args: TrainingArguments | None = None, *_: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Look for optimizers that step inside the backward pass.

        Raises:
            ValueError: If there is one, and steps are to be left out.
        """
        self.active = True  # without callbacks from the trainer nobody would read the values
        self.steps_backward = what_steps_backward("" if args is None else args.optim, model)
        if not self.steps_backward:
            return
        check_may_skip(self.skip, self.steps_backward)
        if self.accelerator.is_main_process:
            logger.warning(
                "%s. Losses and similarities are checked before it, but a gradient that is not finite is not noticed.",
                self.steps_backward[0].upper() + self.steps_backward[1:],
            )

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.active = False
        self.reset()

    def on_step_begin(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.reset()
        if self.skip and model is not None:  # the forward moves running statistics before the check
            moving = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            self._buffers = [(buffer, buffer.clone()) for buffer in moving]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, optimizer: Optimizer | None = None, **kwargs: Any
    ) -> None:
        """Raise FloatingPointError on every rank, or drop the gradients, if a value on any rank is not finite."""
        if not self._any_not_finite():
            self.logs.take(self.sums)
            if self._on_taken is not None:
                self._on_taken()
            return
        step, names = state.global_step + 1, self._names()
        if not self.skip:
            taken = "The optimizer had already taken it; the checkpoints are those of earlier steps."
            raise self._error(step, names, taken if self.steps_backward else self._what_was_done())
        self.left_out = True
        for buffer, before in self._buffers:
            buffer.copy_(before)
        assert optimizer is not None
        optimizer.zero_grad()  # without gradients the optimizer changes neither weights nor moments
        if self.accelerator.is_main_process:
            logger.warning("Optimizer step %d is left out because it is not finite: %s.", step, names)
            self.logs.add("guidance/skipped_steps", 1.0, 0)

    def check_before_backward(self, state: TrainerState) -> None:
        """Raise FloatingPointError on every rank if a loss on any rank is not finite, and the backward would step.

        Does nothing under other optimizers. All processes must call this, before each backward pass.
        """
        if self.active and self.steps_backward and self._any_not_finite():
            done = "Its backward pass, in which the optimizer takes the step, was not run."
            raise self._error(state.global_step + 1, self._names(), done)

    def _error(self, step: int, names: str, done: str) -> FloatingPointError:
        skip = "" if self.steps_backward else ", or leave such steps out with on_non_finite='skip'"
        what = "Lower the learning rate, check the data" if skip else "Lower the learning rate, or check the data"
        if GUIDE_LAYER in names:
            what = (
                "It is the frozen guide that is not finite, whatever the learning rate: check its weights and its "
                "inputs, and load it in float32 or bfloat16 if it is in float16"
            )
        return FloatingPointError(f"Optimizer step {step} is not finite: {names}. {done} {what}{skip}.")

    def _names(self) -> str:
        """Describe the values of all ranks that are not finite. All processes must call this."""
        found = gather_object([self._not_finite()])
        words = [word for losses, _ in found for word in losses] or list(
            dict.fromkeys(w for _, ws in found for w in ws)
        )
        more = len(words) - MAX_NAMED
        return "; ".join(words[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")

    def _what_was_done(self) -> str:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # its step is part of the backward pass
            return "DeepSpeed had already taken it; the checkpoints are those of earlier steps."
        return "It was not taken: the weights and the checkpoints are those of earlier steps."

    def _any_not_finite(self) -> bool:
        seen = [values for _, _, values in self._seen]
        values = torch.cat(seen) if seen else torch.zeros(1, device=self.accelerator.device)
        count = (~values.isfinite()).sum().float()
        return self.accelerator.reduce(count, reduction="sum").item() > 0

    def _not_finite(self) -> tuple[list[str], list[str]]:
        """Describe the values that are not finite: losses and similarities with their places, then gradients."""
        losses, gradients = [], []
        rank = [f"rank {self.accelerator.process_index}"] if self.accelerator.num_processes > 1 else []
        for where, names, values in self._seen:
            place = ", ".join([*([where] if where else []), *rank])
            for name, value in zip(names, values.tolist(), strict=True):
                if not math.isfinite(value):
                    words = f"the {name} is {value}"
                    if name == GRADIENT:
                        gradients.append(words)
                    else:
                        losses.append(f"{words} ({place})" if place else words)
        return losses, gradients


def guide_layers_to_check(layers: Groups) -> dict[str, Tensor]:
    """Return a scalar for each layer of the guide that is NaN unless all of the layer's values are finite."""
    return {
        f"{GUIDE_LAYER} {name}": torch.stack([(0 * layer.values.detach()).sum() for layer in groups]).sum()
        for name, groups in layers.items()
    }


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
