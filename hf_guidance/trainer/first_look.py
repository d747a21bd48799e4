"""A look at the start of training: the first batch, measured in the first step, printed with its warnings."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import logging as of_transformers

from hf_guidance.analysis.first_batch import FirstLook, look_at_layer, look_at_pairs, render
from hf_guidance.analysis.first_warnings import warnings_of
from hf_guidance.features.rows import Batch
from hf_guidance.guide.freezing import BATCH_NORM
from hf_guidance.guide.inputs import without_guide
from hf_guidance.guide.random_state import kept_random_state
from hf_guidance.guide.sharding import gathered
from hf_guidance.loss import Watched
from hf_guidance.trainer.clock import TrainingClock
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.uploads import one_line

logger = logging.getLogger(__name__)

MODERATE = 2**8  # a scale of the loss in half precision, if the loss scaler's own overflows


def take_first_look(
    trainer: GuidedTrainer,
    model: nn.Module,
    inputs: Batch,
    task_loss: Tensor,
    watched: Watched,
    num_items: Tensor | int | None,
) -> FirstLook | None:
    """Look at the first batch inside the first training step, and print the look. A failure gives a warning.

    Weights, gradients, buffers and random states stay as they are. All processes must call this.

    Args:
        trainer: The trainer, in its first step.
        model: The target in its wrapper.
        inputs: The batch.
        task_loss: Its task loss with the graph.
        watched: The watched forward with its layers, its loss weighted as Trainer needs it.
        num_items: Number of items that Trainer passes to the target.

    Returns:
        The look. None if it failed, or the batch was not guided.
    """
    clocks = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TrainingClock)]
    try:
        with clocks[0].paused() if clocks else nullcontext():
            look = look_at_start(trainer, model, inputs, task_loss, watched, num_items)
            if look is not None:
                show(look, trainer)
            return look
    except Exception as error:  # a diagnostic must not prevent training
        logger.warning("The look at the first batch failed (%s: %s). Training goes on.", type(error).__name__, error)
        return None
    finally:
        trainer.guidance_loss.keeps_layers, watched.layers = False, None


def look_at_start(
    trainer: GuidedTrainer,
    model: nn.Module,
    inputs: Batch,
    task_loss: Tensor,
    watched: Watched,
    num_items: Tensor | int | None,
) -> FirstLook | None:
    """Do as `take_first_look` does, but print nothing and raise any error."""
    loss, config, guide = trainer.guidance_loss, trainer.guidance, trainer.guide
    assert watched.layers is not None
    targets, guides = watched.layers
    with unchanged(loss.target, guide):
        if watched.loss is None:
            return None
        pairs = look_at_pairs(watched.similarities, config.measure, targets, guides)
        look = FirstLook(
            config.measure,
            config.sample_axis,
            config.guidance_weight,
            config.guidance_reduction,
            pairs,
            {name: look_at_layer(targets[name]) for name in dict.fromkeys(pair.target for pair in pairs)},
            {name: look_at_layer(guides[name]) for name in dict.fromkeys(pair.guide for pair in pairs)},
        )
        look.not_measured = _why_no_gradients(trainer, model, task_loss, watched)
        if not look.not_measured:
            losses = watched.weights.task * task_loss, config.guidance_weight * watched.loss
            scaler = trainer.accelerator.scaler
            scales = [1.0] if scaler is None else [scaler.get_scale(), MODERATE, 1.0]
            look.gradient_ratio, look.not_measured = gradient_ratio(*losses, loss.target, scales)
        if num_items is not None and _sums_over_micro_batches(trainer):
            look.uses_item_count = uses_item_count(trainer, inputs, num_items)
    has_batch_norm = any(isinstance(module, BATCH_NORM) for module in guide.modules())
    steps = trainer.args.gradient_accumulation_steps
    options: Any = {"has_batch_norm": has_batch_norm, "accumulation": steps}
    look.warnings = warnings_of(look, config, **options)
    return look


def show(look: FirstLook, trainer: GuidedTrainer) -> None:
    """Print a look above the progress bar, and log its warnings, on the main process."""
    if not trainer.is_world_process_zero():
        return
    with tqdm.external_write_mode():
        if trainer.args.should_log and of_transformers.get_verbosity() < logging.ERROR:
            print(render(look), flush=True)
        for warning in look.warnings:
            logger.warning("%s", warning)


# ------------------------------------------------------------------------------------------------ nothing is changed


@contextmanager
def unchanged(*networks: nn.Module) -> Iterator[None]:
    """Restore random states, buffers and training modes of networks when the context ends."""
    buffers = [buffer for network in networks for buffer in network.buffers() if not buffer.is_meta]
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    with kept_random_state():
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.data.copy_(before)  # unnoticed by autograd, whose graph may hold the buffer


# ---------------------------------------------------------------------------------------------------- the gradients


def _why_no_gradients(trainer: GuidedTrainer, model: nn.Module, task_loss: Tensor, watched: Watched) -> str:
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


def gradient_ratio(
    task: Tensor, guidance: Tensor, target: nn.Module, scales: Collection[float] = (1.0,)
) -> tuple[float | None, str]:
    """Compute the norm of guidance's gradient over that of the task's, in the weights that guidance reaches.

    In the outputs of layers the ratio misleads: slopes of the task point the same way in many samples and add up in a
    weight, those of guidance less so.

    Args:
        task: The weighted task loss.
        guidance: The weighted guidance loss.
        target: The target. Its gradients are not touched.
        scales: Factors of both losses, tried in this order until both norms are finite.

    Returns:
        The ratio, or None and the reason.
    """
    # hooks may count their calls, or take a step as LOMO's do
    weights = [weight for weight in target.parameters() if weight.requires_grad and not weight._backward_hooks]
    if not weights:
        return None, "all weights have hooks"
    for scale in scales:
        try:
            of_guidance = _norms(guidance, weights, scale)
            reached = [weight for weight, norm in zip(weights, of_guidance, strict=True) if norm is not None]
            of_task = _norms(task, reached, scale) if reached else []
        except RuntimeError as error:  # memory is short, or a backward works only once
            return None, one_line(error)
        above, below = (math.hypot(*(norm for norm in norms if norm is not None)) for norms in (of_guidance, of_task))
        if math.isfinite(above) and math.isfinite(below):
            return (above / below, "") if below else (None, "the task has no gradient there")
    return None, "it is not finite"


def _norms(loss: Tensor, weights: Sequence[Parameter], scale: float) -> list[float | None]:
    """Compute the norm of a loss's gradient in each weight; None where it does not arrive."""
    found = torch.autograd.grad(loss, weights, torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
    dense = [g.coalesce().values() if g is not None and g.is_sparse else g for g in found]
    norms = [None if g is None else torch.linalg.vector_norm(g.detach(), dtype=torch.float32) for g in dense]
    return [None if norm is None else float(gathered(norm)) for norm in norms]


# -------------------------------------------------------------------------------------------------- the item count


def _sums_over_micro_batches(trainer: GuidedTrainer) -> bool:
    """Tell whether Trainer takes the target's own loss as divided by the items of all micro-batches."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.args.torch_compile
    accumulates = trainer.args.gradient_accumulation_steps > 1
    return accumulates and trainer.model_accepts_loss_kwargs and not sharded


@torch.no_grad()
def uses_item_count(trainer: GuidedTrainer, inputs: Batch, num_items: Tensor | int) -> bool | None:
    """Tell whether the task loss of a batch depends on the number of items; None if the loss is 0 or not finite.

    The target runs twice, in evaluation mode. The loss is that of `transformers.Trainer`, not of a subclass of it.
    Call this inside `unchanged`.
    """
    target: Any = trainer.guidance_loss.target
    own: Any = trainer
    batch = without_guide(inputs, trainer.guidance.sample_id_column)
    target.eval()
    losses: Any = [
        Trainer.compute_loss(own, target, dict(batch), num_items_in_batch=count) for count in (num_items, 2 * num_items)
    ]
    once, twice = map(float, losses)
    return once != twice if once and math.isfinite(once) else None
