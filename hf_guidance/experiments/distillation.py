"""Logit distillation, the baseline that the paper compares with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from hf_guidance.features.batch import Batch
from hf_guidance.guide.forward import accepted_columns, forward_arguments, guide_batch, without_guide
from hf_guidance.guide.freezing import freeze
from hf_guidance.guide.identity import identity
from hf_guidance.guide.inputs import GUIDE_PREFIX, NO_LABEL

CAUSAL: Any = MODEL_FOR_CAUSAL_LM_MAPPING
PREDICT_EACH_POSITION = (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)


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
    """A Trainer that learns from labels and the guide's softened predictions: (1 − w)·task loss + w·T²·KL(guide ‖
    target).

    The KL divergence is averaged over what the task loss is averaged over: rows of a classifier, positions with a label
    of a language model or a token classifier. Under accumulation, Trainer sums the task loss of a model that accepts
    `num_items_in_batch` and does not use it: set `model.accepts_loss_kwargs = False` for such a model.

    Args:
        guide: The frozen network, with task head, and the target's classes or vocabulary.
        distillation_weight: W, the weight of the guide's predictions, in [0, 1].
        temperature: T, by which the logits of both networks are divided; above 0.
        **kwargs: Arguments of the Trainer.

    Raises:
        ValueError: If weight or temperature is out of range; in training, if the guide has other classes or positions,
            or the target is none of these networks.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531).
    """

    def __init__(
        self, *args: Any, guide: nn.Module, distillation_weight: float = 0.5, temperature: float = 4.0, **kwargs: Any
    ) -> None:
        if not 0 <= distillation_weight <= 1 or not temperature > 0:
            raise ValueError(
                f"distillation_weight is {distillation_weight} and temperature {temperature}; the weight must be in "
                "[0, 1] and the temperature above 0."
            )
        super().__init__(*args, **kwargs)
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
        own, kwargs = without_guide(inputs), {"num_items_in_batch": num_items_in_batch}
        if not model.training:
            return super().compute_loss(model, own, return_outputs=return_outputs, **kwargs)
        labels: Any = inputs.get("labels")
        if labels is None:
            raise ValueError(f"the batch has no labels, but {sorted(inputs)}: distillation needs the task's labels.")
        hard, outputs = super().compute_loss(model, own, return_outputs=True, **kwargs)
        network, ours = self.accelerator.unwrap_model(model, keep_torch_compile=False), outputs["logits"]
        theirs = self._predicted_by_guide(inputs, network)
        _check_alike(network, ours, self.guide, theirs)
        ours, theirs = (with_label(network, part, labels) for part in (ours, theirs))
        soft = kl_div(
            log_softmax(ours.float() / self.temperature, -1),
            log_softmax(theirs.float() / self.temperature, -1),
            reduction="sum",
            log_target=True,
        )
        soft = soft / self._count(len(ours), num_items_in_batch)
        loss = (1 - self.distillation_weight) * hard + self.distillation_weight * self.temperature**2 * soft
        return (loss, outputs) if return_outputs else loss

    def _predicted_by_guide(self, inputs: Batch, network: nn.Module) -> Tensor:
        args, kwargs = forward_arguments(self.guide, guide_batch(inputs, network, self.guide))
        with torch.no_grad(), self.accelerator.autocast():
            logits: Tensor | None = getattr(self.guide(*args, **kwargs), "logits", None)
        if logits is None:
            raise ValueError(
                f"the guide ({type(self.guide).__name__}) predicts nothing: load it with its task head, as by "
                "load_guide(source, auto_class=AutoModelForCausalLM)."
            )
        return logits

    def _count(self, here: int, num_items: Tensor | int | None) -> Tensor | float:
        """Return what Trainer divides a sum over this batch by, so that it becomes a mean over the optimizer step."""
        if num_items is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return max(here, 1)
        return num_items / self.accelerator.num_processes if self.args.average_tokens_across_devices else num_items

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        own = [GUIDE_PREFIX + name for name in accepted_columns(self.guide)]
        columns: Any = self._signature_columns  # annotated as None, and is a list by now
        columns += [name for name in own if name not in columns]

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, without_guide(inputs), *args, **kwargs)


def _check_alike(network: nn.Module, ours: Tensor, guide: nn.Module, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the target gives logits {tuple(ours.shape)} and the guide {tuple(theirs.shape)}: distillation needs "
            "a guide with the same classes, or for text the same vocabulary and tokens."
        )
    if ours.ndim > 2 and _is_one_of(network, CAUSAL) != _is_one_of(guide, CAUSAL):
        raise ValueError(
            f"of {type(network).__name__} and the guide {type(guide).__name__} one predicts the next token at a "
            "position and the other that token itself: distillation needs two networks of one kind."
        )


def with_label(network: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Select the logits that predict a label: one of each row, or those of positions whose label is not ignored.

    Args:
        network: The network, whose class tells whether a position predicts its own label or the next one.
        logits: `(rows, classes)` or `(rows, positions, classes)`.
        labels: `(rows,)` or `(rows, positions)` of whole numbers.

    Returns:
        `(predictions, classes)`.

    Raises:
        ValueError: If the network is no classifier of rows or tokens, and no language model.
    """
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"distillation needs a class per row, or one per position; the labels are {tuple(labels.shape)} of "
            f"{labels.dtype} and the logits {tuple(logits.shape)}."
        )
    if labels.ndim > 1 and _is_one_of(network, CAUSAL):
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif labels.ndim > 1 and not any(_is_one_of(network, those) for those in PREDICT_EACH_POSITION):
        raise ValueError(
            f"it is not known which label a position of {type(network).__name__} predicts: distillation takes "
            "classifiers of rows and of tokens, causal and masked language models, and encoder-decoders of text."
        )
    return logits[labels != NO_LABEL]


def _is_one_of(network: Any, classes: Any) -> bool:
    network = network.get_base_model() if hasattr(network, "get_base_model") else network  # of peft
    return isinstance(network, classes.get(type(getattr(network, "config", None)), ()))
