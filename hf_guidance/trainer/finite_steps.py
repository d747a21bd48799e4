"""A loss that is not finite stops training with the name of the pair, or its step is left out."""

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
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_guidance.guide.sharding import gathered
from hf_guidance.similarity.pair_loss import Groups
from hf_guidance.trainer.logs import RunningMeans

logger = logging.getLogger(__name__)

GRADIENT = "norm of the gradient"
GUIDE_LAYER = "guide layer"
MAX_NAMED = 5  # values in an error
STEPPING_BACKWARD = ("lomo", "adalomo")  # with all names that end in `layerwise`; optimizers of TrainingArguments


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


def what_steps_backward(optimizer: str, network: nn.Module | None = None) -> str:
    """Tell in words what takes optimizer steps inside the backward pass; empty if nothing does.

    Args:
        optimizer: Name of the optimizer, `optim` of the `TrainingArguments`.
        network: Network in training. Hooks that run once a weight's gradient is complete may take its step.
    """
    name = str(optimizer.value if isinstance(optimizer, OptimizerNames) else optimizer)
    if name in STEPPING_BACKWARD or name.endswith("layerwise"):
        return f"the optimizer {name} takes its steps inside the backward pass"
    hooked = [p for p in network.parameters() if p._post_accumulate_grad_hooks] if network is not None else []
    if hooked:
        return (
            f"{len(hooked)} weights have hooks that run once their gradient is complete "
            "(register_post_accumulate_grad_hook), as of optimizers that step inside the backward pass"
        )
    return ""


def check_may_skip(skip: bool, steps_backward: str) -> None:
    """Raise ValueError if steps are to be left out that are taken inside the backward pass."""
    if skip and steps_backward:
        raise ValueError(
            f"on_non_finite='skip' cannot leave a step out here: {steps_backward}. Use on_non_finite='stop', or "
            "another optimizer."
        )
