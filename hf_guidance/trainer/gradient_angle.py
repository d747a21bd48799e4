"""The gradients of task and guidance beside each other: the ratio of their norms, and the angle between them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hf_guidance.guide.sharding import gathered
from hf_guidance.loss import Watched
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.steps import RunningMeans, is_last_before_log
from hf_guidance.trainer.uploads import one_line

logger = logging.getLogger(__name__)

MODERATE = 2**8  # a scale of the loss in half precision, if the loss scaler's own overflows


class Gradients(NamedTuple):
    """Gradients of guidance and task in the weights that guidance reaches.

    Attributes:
        ratio: Norm of guidance's gradient over that of the task's.
        cosine: Cosine of the angle between them: below 0 where guidance pulls against the task.
    """

    ratio: float
    cosine: float


def note_gradients(
    trainer: GuidedTrainer, sums: RunningMeans, model: nn.Module, task_loss: Tensor, watched: Watched
) -> None:
    """Add ratio and cosine of the gradients to what is logged next, if this step is the last one before a log.

    Args:
        trainer, model, task_loss, watched: As of `gradients_of`.
        sums: Receives `guidance/gradient_ratio` and `guidance/gradient_cosine`.
    """
    if watched.loss is None or not is_last_before_log(trainer, trainer.state.global_step):
        return
    found = gradients_of(trainer, model, task_loss, watched, watched.weights.guidance)
    if isinstance(found, str):
        _say(found)
        return
    sums.add("guidance/gradient_ratio", found.ratio)
    sums.add("guidance/gradient_cosine", found.cosine)


@cache
def _say(why: str) -> None:
    logger.warning("log_gradients measures nothing here: %s.", why)


def gradients_of(
    trainer: GuidedTrainer, model: nn.Module, task_loss: Tensor, watched: Watched, weight: float
) -> Gradients | str:
    """Compare the gradients of a training step's two losses before its backward.

    Gradients, weights and the graph stay as they are. Each process takes its own batch.

    Args:
        trainer: The trainer.
        model: The target in its wrapper.
        task_loss: The task loss with the graph.
        watched: The watched forward, its loss not yet weighted.
        weight: Weight of the guidance loss.

    Returns:
        The comparison, or why there is none.
    """
    if why := _why_not(trainer, model, task_loss, watched):
        return why
    assert watched.loss is not None
    losses = watched.weights.task * task_loss, weight * watched.loss
    scaler = trainer.accelerator.scaler
    scales = [1.0] if scaler is None else [scaler.get_scale(), MODERATE, 1.0]
    return compare_gradients(*losses, trainer.guidance_loss.target, scales)


def _why_not(trainer: GuidedTrainer, model: nn.Module, task_loss: Tensor, watched: Watched) -> str:
    """Explain why the graph cannot be used twice, or holds no task loss; empty if it can."""
    assert watched.loss is not None
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in trainer.guidance_loss.target.modules())
    reasons = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "torch.compile": trainer.args.torch_compile or compiled,
        "a static graph of DDP": bool(getattr(model, "static_graph", False)),
        "pre-alignment has no task loss": not watched.weights.task,
        "the task loss has no gradient": not task_loss.requires_grad,
        "Liger kernels overwrite what their backward needs": trainer.args.use_liger_kernel,
    }
    found = next((why for why, holds in reasons.items() if holds), "")
    return found or ("reentrant activation checkpointing" if _is_reentrant(task_loss) else "")


def _is_reentrant(loss: Tensor) -> bool:
    """Tell whether a graph has parts under reentrant activation checkpointing, which takes only a full backward."""
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return any(node.name() == "CheckpointFunctionBackward" for node in seen)


def compare_gradients(
    task: Tensor, guidance: Tensor, target: nn.Module, scales: Collection[float] = (1.0,)
) -> Gradients | str:
    """Compare the gradients of two losses in the weights that guidance reaches.

    In the outputs of layers the ratio misleads: slopes of the task point the same way in many samples and add up in a
    weight, those of guidance less so.

    Args:
        task: The weighted task loss.
        guidance: The weighted guidance loss.
        target: The target. Its gradients are not touched.
        scales: Factors of both losses, tried in this order until both norms are finite.

    Returns:
        The comparison, or why there is none.
    """
    # hooks may count their calls, or take a step as LOMO's do
    weights = [weight for weight in target.parameters() if weight.requires_grad and not weight._backward_hooks]
    if not weights:
        return "all weights have hooks"
    for scale in scales:
        try:
            of_guidance = _gradients(guidance, weights, scale)
            reached = [weight for weight, slope in zip(weights, of_guidance, strict=True) if slope is not None]
            of_task = _gradients(task, reached, scale) if reached else []
        except RuntimeError as error:  # memory is short, or a backward works only once
            return one_line(error)
        pairs = list(zip([slope for slope in of_guidance if slope is not None], of_task, strict=True))
        above = math.hypot(*(_norm(one) for one, _ in pairs))
        below = math.hypot(*(_norm(other) for _, other in pairs if other is not None))
        if math.isfinite(above) and math.isfinite(below):
            if not below:
                return "the task has no gradient there"
            product = sum(_product(one, other) for one, other in pairs if other is not None)
            return Gradients(above / below, product / (above * below) if above else 0.0)
    return "it is not finite"


def _gradients(loss: Tensor, weights: Sequence[Parameter], scale: float) -> list[Tensor | None]:
    """Compute a loss's gradient in each weight; None where it does not arrive."""
    found = torch.autograd.grad(loss, weights, torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
    return [None if slope is None else slope.detach() for slope in found]


def _norm(slope: Tensor) -> float:
    values = slope.coalesce().values() if slope.is_sparse else slope
    return float(gathered(torch.linalg.vector_norm(values.to(torch.float32))))


def _product(one: Tensor, other: Tensor) -> float:
    dense = (slope.to_dense() if slope.is_sparse else slope for slope in (one, other))
    first, second = (slope.flatten().float() for slope in dense)
    return float(gathered(first @ second))
