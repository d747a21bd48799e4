"""The parts of a guided trainer that the functions of this room use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_guidance.config import GuidanceConfig
from hf_guidance.loss import GuidanceLoss


class GuidedTrainer(Protocol):
    """A `GuidanceTrainer`, or another Trainer behind `GuidanceMixin`; `guide` is None where there is no guidance."""

    model: Any
    args: TrainingArguments
    state: TrainerState
    accelerator: Accelerator
    callback_handler: CallbackHandler
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    hub_model_id: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    model_accepts_loss_kwargs: bool
    guide: Any
    guidance: GuidanceConfig
    guide_identity: dict[str, Any]
    resumed: bool

    @property
    def guidance_loss(self) -> GuidanceLoss:
        """The loss for the model now in training."""

    def is_world_process_zero(self) -> bool:
        """Tell whether this is the first process of all."""

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def _remove_unused_columns(self, dataset: Any) -> Dataset[Any]: ...

    def _get_collator_with_removed_columns(self, data_collator: Callable[..., Any]) -> Callable[..., Any]: ...
