"""The optimizer steps of a run: means to log, values that must be finite, which steps were guided, and their time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from hf_guidance.guide.sharding import gathered
from hf_guidance.loss import Watched
from hf_guidance.schedule import Schedule
from hf_guidance.trainer.not_finite import join, not_finite, words_for
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.stepping_backward import check_may_skip, what_steps_backward

logger = logging.getLogger(__name__)

Moment: TypeAlias = float | torch.Event

MAX_EVENTS = 1000  # steps whose events are kept before they are read, which waits for the device
WARM_UP = 5  # first steps of a process, which allocate, compile and fill caches
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

    Attributes:
        on_taken: Called before every step that is taken; None for nothing.
        sums: Logs of the micro-steps in the present optimizer step.
        left_out: Whether the present optimizer step is left out.
        steps_backward: What takes steps inside the backward pass, in words; empty if nothing does.
    """

    def __init__(self, accelerator: Accelerator, logs: RunningMeans, skip: bool) -> None:
        self.accelerator, self.logs, self.skip, self.active = accelerator, logs, skip, False
        self.on_taken: Callable[[], None] | None = None
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
            if self.on_taken is not None:
                self.on_taken()
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
        return not_finite(step, names, done, may_skip=not self.steps_backward)

    def _names(self) -> str:
        """Describe the values of all ranks that are not finite. All processes must call this."""
        rank = self.accelerator.process_index if self.accelerator.num_processes > 1 else None
        return join(gather_object([words_for(self._seen, rank)]))

    def _what_was_done(self) -> str:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # its step is part of the backward pass
            return "DeepSpeed had already taken it; the checkpoints are those of earlier steps."
        return "It was not taken: the weights and the checkpoints are those of earlier steps."

    def _any_not_finite(self) -> bool:
        seen = [values for _, _, values in self._seen]
        values = torch.cat(seen) if seen else torch.zeros(1, device=self.accelerator.device)
        count = (~values.isfinite()).sum().float()
        return self.accelerator.reduce(count, reduction="sum").item() > 0


class GuidedSteps(TrainerCallback):
    """A callback that counts the optimizer steps that were guided.

    Args:
        begin: Called when training begins. It raises ValueError if guidance would not do what its settings say, which
            may have changed since construction, as in a hyperparameter search. The trainer prepares its guide there.
        schedule: Returns the function optimizer step → weights of guidance and task.
        is_left_out: Returns whether the present optimizer step is left out because it is not finite.

    Attributes:
        before: Guided steps of the run before this call of `train`; None if unknown.
        guided: Guided steps of this call.
    """

    def __init__(
        self, begin: Callable[[], None], schedule: Callable[[], Schedule], is_left_out: Callable[[], bool]
    ) -> None:
        self.begin, self.schedule, self.is_left_out = begin, schedule, is_left_out
        self.before: int | None = 0
        self.first, self.guided, self._pending = 0, 0, False
        self._reasons: dict[str, str] = {}  # first word → reason

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reset the counts, and begin."""
        self.first, self.guided, self._reasons = state.global_step, 0, {}
        self.begin()
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


class Clock:
    """A clock that reads the CPU time of this process, or on an accelerator the time between its events.

    CPU time does not count what other processes do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Moment:
        """Return a point in time; on a GPU, after all work that was queued so far."""
        if self.device.type == "cpu":
            return time.process_time()
        event = torch.Event(self.device.type, enable_timing=True)
        event.record()
        return event

    def between(self, began: Moment, ended: Moment) -> float:
        """Return the seconds between two points, after waiting for the device to reach the second."""
        if isinstance(began, float):
            assert isinstance(ended, float)
            return ended - began
        assert not isinstance(ended, float)
        ended.synchronize()
        return began.elapsed_time(ended) / 1000


class TrainingClock(TrainerCallback, ExportableState):
    """A callback that adds up the time of training steps, without evaluation, saving and data loading.

    The time is saved in checkpoints and survives a resume.

    Attributes:
        steps: Number of steps.
        seconds: Time of the steps that have been added up, in seconds; at an evaluation, a save and the end, of all.
        marks: `(step, seconds so far)` at every evaluation.
        cold: Number of the steps that were the first ones of a process, and their seconds.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.marks: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.cold: tuple[int, float] = (0, 0.0)
        self._warms_up = WARM_UP  # steps of this process that still count as cold
        self._events: list[tuple[tuple[Moment, Moment], ...]] = []  # of steps not yet in `seconds`, each before pauses
        self._pauses: list[tuple[Moment, Moment]] = []
        self._clock = Clock(torch.device("cpu"))
        self._is_in_step = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._clock, self._warms_up = Clock(args.device), WARM_UP
        # Trainer restores callbacks only with restore_callback_states_from_checkpoint, and saves those its state knows
        callbacks: Any = state.stateful_callbacks  # annotated as a list, and is a dict
        saved = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            kept = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
            self.seconds, self.marks = kept["seconds"], [(step, at) for step, at in kept["marks"]]
            self.steps = kept.get("steps", state.global_step)
            self.cold = tuple(kept.get("cold", self.cold))

    def on_step_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._began, self._is_in_step = self._clock.now(), True

    def on_step_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self._events.append(((self._began, self._clock.now()), *self._pauses))
        self._pauses, self._is_in_step = [], False
        self.steps += 1
        if len(self._events) >= MAX_EVENTS:
            self._settle()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside this context out, if it is part of a step."""
        began, counts = self._clock.now(), self._is_in_step
        try:
            yield
        finally:
            if counts:
                self._pauses.append((began, self._clock.now()))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._settle()
        self.marks.append((state.global_step, self.seconds))

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self._settle()

    def steady_seconds(self) -> float:
        """Return the time that all steps would take without warming up: the cold ones count as the mean of the others.

        With fewer than five others, or as many as there are cold ones, it is the time that was measured.
        """
        self._settle()
        count, seconds = self.cold
        others = self.steps - count
        if others < max(WARM_UP, count):
            return self.seconds
        return (self.seconds - seconds) * self.steps / others

    def state(self) -> dict[str, Any]:
        self._settle()
        kept = {"seconds": self.seconds, "marks": self.marks, "steps": self.steps, "cold": self.cold}
        return {"args": {}, "attributes": kept}

    def _settle(self) -> None:
        for step, *pauses in self._events:
            spent = self._clock.between(*step) - sum(self._clock.between(*pause) for pause in pauses)
            self.seconds += spent
            if self._warms_up:
                self.cold, self._warms_up = (self.cold[0] + 1, self.cold[1] + spent), self._warms_up - 1
        self._events = []
