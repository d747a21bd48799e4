"""A guide too large for one device: each process keeps a share of its weights, and gathers a block's when that runs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

# whose parts are read without being called, by these or by their parents
ATOMIC = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
READ_BY_PARENT = (nn.ParameterList, nn.ParameterDict)
LARGEST = 0.1  # share of all weights above which a module is taken apart, if it has parts


def shard(guide: nn.Module) -> nn.Module:
    """Spread the weights of a frozen guide over all processes, in place; every forward must then run on all of them.

    A unit, whose weights are together while it runs, is a block that transformers' ``_no_split_modules`` names, or else
    any module with no more than a tenth of the weights. What larger modules hold of their own stays whole. The guide
    may still be on the host: no device has to hold all of it at any time. With one process nothing is done.
    Weights that a forward reads without calling their module cannot be sharded: torch says that tensors are mixed.

    Args:
        guide: whose weights every process has in full; one that is sharded already stays as it is.

    Raises:
        ValueError: a guide that is quantised or spread by a device map.

    Source: ``torch.distributed.fsdp.fully_shard``.
    """
    if is_sharded(guide):
        return guide
    if getattr(guide, "hf_device_map", None) or getattr(guide, "is_quantized", False):
        raise ValueError(
            "shard_guide spreads whole weights over the processes, and this guide is quantised or spread by a "
            "device_map already: load it without, or leave shard_guide out."
        )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        logger.warning("shard_guide has no other process to share the guide with: it is kept whole.")
        return guide
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = torch.accelerator.current_accelerator() if dist.get_backend() != "gloo" else None
    mesh = init_device_mesh(device.type if device else "cpu", (dist.get_world_size(),))
    units = _units(guide)
    uses = Counter(parameter for unit in units for parameter in unit.parameters())
    tied = {parameter for parameter, count in uses.items() if count > 1}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=tied)
    if device:
        guide.to(device)  # what stays whole
    return guide


@contextmanager
def built_whole() -> Iterator[None]:
    """Networks built inside are whole on every process.

    Under ZeRO-3 transformers builds them in pieces, which only a network that is trained by DeepSpeed puts together.
    """
    from transformers.integrations import deepspeed

    settings = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    kept = None if settings is None else settings()
    if kept is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(kept)


def check_whole(guide: nn.Module) -> None:
    """Raise ValueError for a guide that ZeRO-3 built in pieces."""
    if any(hasattr(parameter, "ds_id") for parameter in guide.parameters()):
        raise ValueError(
            "the guide was built in pieces, as transformers builds every network under DeepSpeed ZeRO-3 once there are "
            "TrainingArguments, and nothing would put them together. Load it with load_guide, or before that."
        )


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def whole(value: Value) -> Value:
    """A tensor (or number) in full, gathered from all processes (which must all ask) if it is sharded."""
    found: Any = value.full_tensor() if isinstance(value, DTensor) else value
    return found


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's state in full, on the host; all processes must ask for it."""
    return {name: whole(value.detach()).cpu().clone() for name, value in network.state_dict().items()}


def _units(guide: nn.Module) -> list[nn.Module]:
    # transformers finds by its class what a network records, and `fully_shard` changes the class: never a whole model
    names, total = set(getattr(guide, "_no_split_modules", None) or ()), _size(guide)

    def within(module: nn.Module) -> list[nn.Module]:
        units: list[nn.Module] = []
        for child in module.children():
            small = _size(child) <= LARGEST * total or not any(child.children())
            whole_unit = small or type(child).__name__ in names or isinstance(child, ATOMIC)
            is_model = isinstance(child, (PreTrainedModel, nn.ModuleList, nn.ModuleDict))
            if _size(child) and not isinstance(child, READ_BY_PARENT):
                units += [child] if whole_unit and not is_model else within(child)
        return units

    return list(dict.fromkeys(within(guide)))  # a module may stand in two places


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
