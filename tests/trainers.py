"""Tiny trainers that the tests share, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import arguments, gradients, linear, token_rows
from torch import Tensor, nn
from transformers import Trainer

from hf_guidance import GuidanceConfig, GuidanceTrainer

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def make_trainer(
    folder: Path, target: nn.Module | None = None, guide: nn.Module | None = None, **settings: Any
) -> GuidanceTrainer:
    """A trainer whose settings go to the config or to the trainer by their names, the rest to its arguments.

    With `looks=False` there is no look at the first batch, which runs the guide once more, for tests that count.
    """
    looks = settings.pop("looks", True)
    own = {"train_dataset", "eval_dataset", "compute_loss_func", "model_init", "callbacks", "data_collator"}
    for_trainer = {name: settings.pop(name) for name in own & settings.keys()}
    fields = GuidanceConfig.__dataclass_fields__.keys() & settings.keys()
    guidance = linear(**{name: settings.pop(name) for name in fields}) if guide is not None else None
    data = {"train_dataset": token_rows(), **for_trainer}
    args = arguments(folder, **settings)
    trainer = GuidanceTrainer(model=target, guide=guide, guidance=guidance, args=args, **data)
    trainer.takes_first_look = looks
    return trainer


def trained(trainer: Trainer, **kwargs: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and training logs after training."""
    trainer.train(**kwargs)
    return weights(trainer.model), train_logs(trainer)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def train_logs(trainer: Trainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def batches_of(network: nn.Module) -> list[dict[str, Tensor]]:
    """The inputs of every training forward of a network from now on."""
    seen: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.append({name: value for name, value in kwargs.items() if name in ("input_ids", "labels")})

    network.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def descend(network: nn.Module, loss: Tensor) -> None:
    """One step of `SGD` by hand."""
    slopes = gradients(network, loss)
    with torch.no_grad():
        for parameter, slope in zip(network.parameters(), slopes, strict=True):
            parameter -= SGD["learning_rate"] * slope
