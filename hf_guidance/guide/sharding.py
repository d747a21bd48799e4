"""Sharding of a guide that is too large for one device.

Each process keeps a share of the weights, and gathers the weights of a block when it runs.
"""

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

# modules that read weights of their parts without calling these, and containers whose parents do so
ATOMIC = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
READ_BY_PARENT = (nn.ParameterList, nn.ParameterDict)
MAX_UNIT_SHARE = 0.1  # of all weights; a larger module with parts is split


def shard(guide: nn.Module) -> nn.Module:
    """Shard the weights of a frozen guide over all processes, in place. Each forward must then run on all of them.

    The weights of a unit are gathered while it runs. A unit is a block that transformers' `_no_split_modules` names, or
    else any module with at most a tenth of all weights. Weights that larger modules hold themselves are not sharded.
    The guide may still be on the host, so no device ever needs to hold all of it. With one process nothing is done.

    Weights that a forward reads without calling their module cannot be sharded. torch then raises an error about mixed
    tensors.

    Args:
        guide: Frozen guide, whole on every process. A guide that is sharded already does not change.

    Returns:
        The guide.

    Raises:
        ValueError: If the guide is quantised or has a device map.

    Source: `torch.distributed.fsdp.fully_shard`.
    """
    if is_sharded(guide):
        return guide
    if getattr(guide, "hf_device_map", None) or getattr(guide, "is_quantized", False):
        raise ValueError(
            "shard_guide needs a guide with plain weights, but this guide is quantised or spread by a device_map: load "
            "it without these, or leave shard_guide out."
        )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        logger.warning("shard_guide has no effect with one process: the guide is kept whole.")
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
        guide.to(device)  # weights that are not sharded
    return guide


@contextmanager
def built_whole() -> Iterator[None]:
    """Build networks whole on every process inside this context.

    Under ZeRO-3 transformers partitions each network while building it. Only a network that DeepSpeed trains is joined
    again.
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
    """Raise ValueError for a guide that ZeRO-3 partitioned."""
    if any(hasattr(parameter, "ds_id") for parameter in guide.parameters()):
        raise ValueError(
            "the guide was built in pieces, as transformers builds every network under DeepSpeed ZeRO-3 once there are "
            "TrainingArguments, and nothing would join them. Load it with load_guide, or before TrainingArguments."
        )


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def gathered(value: Value) -> Value:
    """Return a tensor or number in full. A sharded one is gathered from all processes, which must all call this."""
    found: Any = value.full_tensor() if isinstance(value, DTensor) else value
    return found


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a full copy of the network's state on the host. All processes must call this."""
    return {name: gathered(value.detach()).cpu().clone() for name, value in network.state_dict().items()}


def _units(guide: nn.Module) -> list[nn.Module]:
    # never shard a model itself: `fully_shard` changes its class, by which transformers finds what a model records
    names, total = set(getattr(guide, "_no_split_modules", None) or ()), _size(guide)

    def within(module: nn.Module) -> list[nn.Module]:
        units: list[nn.Module] = []
        for child in module.children():
            small = _size(child) <= MAX_UNIT_SHARE * total or not any(child.children())
            is_unit = small or type(child).__name__ in names or isinstance(child, ATOMIC)
            is_model = isinstance(child, (PreTrainedModel, nn.ModuleList, nn.ModuleDict))
            if _size(child) and not isinstance(child, READ_BY_PARENT):
                units += [child] if is_unit and not is_model else within(child)
        return units

    return list(dict.fromkeys(within(guide)))  # a module may appear twice


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
