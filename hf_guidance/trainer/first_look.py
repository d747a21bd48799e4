"""A look at the start of training: the first batch, measured in the first step, printed with its warnings."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import logging as of_transformers

from hf_guidance.analysis.first_batch import FirstLook, look_at_layer, look_at_pairs, render
from hf_guidance.analysis.first_warnings import warnings_of
from hf_guidance.features.batch import Batch
from hf_guidance.guide.forward import without_guide
from hf_guidance.guide.freezing import BATCH_NORM
from hf_guidance.guide.random_state import kept_random_state
from hf_guidance.loss import Watched
from hf_guidance.trainer.gradient_angle import gradients_of
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.steps import TrainingClock

logger = logging.getLogger(__name__)


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
        found = gradients_of(trainer, model, task_loss, watched, config.guidance_weight)
        look.gradient_ratio, look.not_measured = (None, found) if isinstance(found, str) else (found.ratio, "")
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
