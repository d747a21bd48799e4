"""Batch norm's statistics for an evaluation, estimated anew instead of followed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_guidance.features.batch import Batch
from hf_guidance.guide.freezing import calibrate_batch_norm


class ReestimatedBatchNorm(TrainerCallback):
    """A callback that estimates batch norm's running statistics from training rows before each evaluation.

    The running means of a deep network follow it late, so that an evaluation measures their delay beside the network.
    Training itself never reads them. Dropout is off, as in an evaluation, and no random number is drawn.

    Args:
        batches: Batches of training rows; each counts alike.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_training_stop:
            reestimate(kwargs["model"], self.batches)


@torch.no_grad()
def reestimate(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Replace the running means and variances of every batch norm by their averages over batches.

    Args:
        model: The network; its modes and its batch norms' momenta are as before afterwards.
        batches: Keyword arguments of its forward; only tensors named `pixel_values` are passed on.
    """
    modes = {module: module.training for module in model.modules()}

    def run(pixels: Any) -> None:
        model(pixel_values=pixels.to(next(model.parameters()).device))

    model.eval()
    try:
        calibrate_batch_norm(model, (partial(run, batch["pixel_values"]) for batch in batches))
    finally:
        for module, mode in modes.items():
            module.training = mode
