"""`GuidanceTrainer`: transformers' Trainer with a guidance loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_guidance.card.facts import Processing
from hf_guidance.config import GuidanceConfig
from hf_guidance.features.inside import check_is_network
from hf_guidance.trainer.guidance_mixin import GuidanceMixin

if TYPE_CHECKING:
    import datasets


class GuidanceTrainer(GuidanceMixin, Trainer):
    """transformers' Trainer with a guidance loss; see `GuidanceMixin`.

    Args:
        model, args, …: As of transformers' Trainer.
        guide: The frozen network, from `load_guide` or any `nn.Module`; None trains without guidance. `"base"` is the
            target's own base, for a target with PEFT's adapters.
        guidance: Settings of guidance; None takes the defaults of `GuidanceConfig`.

    Raises:
        ValueError: At construction, if guidance would not do what its settings say.

    Example:
        >>> trainer = GuidanceTrainer(  # doctest: +SKIP
        ...     model=target, args=args, train_dataset=rows, guide=load_guide("gpt2"), guidance=GuidanceConfig()
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset[Any] | IterableDataset[Any] | datasets.Dataset | None = None,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | datasets.Dataset | None = None,
        processing_class: Processing | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        guide: nn.Module | Literal["base"] | None = None,
        guidance: GuidanceConfig | None = None,
    ) -> None:
        if model is not None:
            check_is_network(model, "model")
        given = {
            "model": model,
            "args": args,
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        given = {name: value for name, value in given.items() if value is not None}
        super().__init__(**given, guide=guide, guidance=guidance)
