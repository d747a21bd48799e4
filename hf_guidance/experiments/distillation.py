"""Logit distillation, the baseline that the paper compares with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Trainer

from hf_guidance.features.rows import Batch
from hf_guidance.guide.freezing import freeze
from hf_guidance.guide.identity import identity
from hf_guidance.guide.inputs import forward_arguments, guide_batch, without_guide


def check_classes(source: str, labels: Sequence[str]) -> None:
    """Raise ValueError if a saved classifier has other classes than the data, or another order of them.

    Args:
        source: Hub id or folder of the classifier.
        labels: Names of the classes of the data, in order.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    theirs = [str(config.id2label[i]) for i in range(config.num_labels)]
    if len(theirs) != len(labels):
        raise ValueError(
            f"distillation needs a guide with the same classes: {source} has {len(theirs)} and the data has "
            f"{len(labels)}. Choose a guide that was trained on these data, or train one on them first."
        )
    if set(theirs) == set(labels) and theirs != list(labels):
        raise ValueError(
            f"distillation needs a guide with the same classes in the same order: those of {source} are "
            f"{', '.join(theirs[:5])} …, those of the data {', '.join(labels[:5])} …"
        )


class DistillationTrainer(Trainer):
    """A Trainer that learns from labels and the guide's softened predictions: (1 − w)·CE + w·T²·KL(guide ‖
    target).

    Args:
        guide: The frozen classifier, with task head and the target's classes.
        distillation_weight: W, the weight of the guide's predictions, in [0, 1].
        temperature: T, by which the logits of both networks are divided; above 0.
        **kwargs: Arguments of the Trainer.

    Raises:
        ValueError: If weight or temperature is out of range; in training, if the guide has other classes.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531).
    """

    model_accepts_loss_kwargs = False

    def __init__(
        self, *args: Any, guide: nn.Module, distillation_weight: float = 0.5, temperature: float = 4.0, **kwargs: Any
    ) -> None:
        if not 0 <= distillation_weight <= 1 or not temperature > 0:
            raise ValueError(
                f"distillation_weight is {distillation_weight} and temperature {temperature}; the weight must be in "
                "[0, 1] and the temperature above 0."
            )
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over the batch
        self.guide = freeze(guide, device=self.accelerator.device)
        self.guide_identity = identity(guide)
        self.distillation_weight, self.temperature = distillation_weight, temperature

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the weighted loss while training, and the task loss alone in evaluation."""
        if not model.training:
            return super().compute_loss(model, without_guide(inputs), return_outputs=return_outputs)
        outputs = model(**without_guide(inputs))
        args, kwargs = forward_arguments(self.guide, guide_batch(inputs, model, self.guide))
        with torch.no_grad(), self.accelerator.autocast():
            theirs = self.guide(*args, **kwargs).logits.float()
        ours = outputs.logits.float()
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the target gives logits {tuple(ours.shape)} and the guide {tuple(theirs.shape)}: distillation needs "
                "a guide with the same classes."
            )
        soft = kl_div(
            log_softmax(ours / self.temperature, -1),
            log_softmax(theirs / self.temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        labels: Any = inputs["labels"]
        hard = cross_entropy(ours, labels)
        loss = (1 - self.distillation_weight) * hard + self.distillation_weight * self.temperature**2 * soft
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, without_guide(inputs), *args, **kwargs)
