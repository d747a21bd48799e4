"""Optimizers that take their steps inside the backward pass."""

from __future__ import annotations

from torch import nn
from transformers.training_args import OptimizerNames

STEPPING_BACKWARD = ("lomo", "adalomo")  # with all names that end in `layerwise`; optimizers of TrainingArguments


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
