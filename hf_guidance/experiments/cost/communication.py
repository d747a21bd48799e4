"""The features that are compared, and the bytes that a global batch sends between processes, counted on one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_guidance.config import GuidanceConfig
from hf_guidance.features.batch import Batch
from hf_guidance.features.distributed import Ranks
from hf_guidance.loss import GuidanceLoss
from hf_guidance.similarity.half_precision import for_tensor_cores
from hf_guidance.similarity.registry import get_measure

FEW = 8  # rows that suffice for counting


class Compared(NamedTuple):
    """A layer in a pair: samples, features after a sketch, type, whether of the target, whether on tensor cores."""

    samples: int
    features: int
    dtype: torch.dtype
    of_target: bool
    on_tensor_cores: bool = False


class _Counting(Ranks):
    """A single process that counts what it would send to others."""

    def __init__(self) -> None:
        self.rank, self.scale, self.bytes_sent = 0, 1, 0
        self.compared: list[Compared] = []

    def numbers(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        return [list(numbers)]

    def smallest(self, values: Tensor, count: int) -> Tensor:
        return values.sort().values[:count]

    def gather(self, x: Tensor, counts: Sequence[int], length: int | None = None) -> Tensor:
        self.bytes_sent += x.nbytes
        if x.is_floating_point():
            on_tensor_cores = for_tensor_cores(x, in_region=True)
            self.compared.append(Compared(len(x), x[0].numel(), x.dtype, x.requires_grad, on_tensor_cores))
        return x


@torch.no_grad()
def bytes_of_global_batch(
    target: nn.Module,
    guide: nn.Module,
    config: GuidanceConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
    batch: dict[str, Tensor],
    sketch: int | None,
) -> int | None:
    """Count the bytes of features and masks that a process sends to each other one in a step with a global batch.

    On the token axis this is an upper bound, because tokens are chosen from the whole batch.

    Args:
        target: The target.
        guide: The guide.
        config: Settings of the guidance.
        autocast: Context for the guide's forward.
        batch: Batch of one process; all its tensors have a row per sample.
        sketch: As in `GuidanceConfig`.

    Returns:
        The bytes; None for a sketch that the measure does not take, or with more dimensions than the widest layer has
        features.
    """
    if sketch is not None and not get_measure(config.resolved_measure()).takes_sketch:
        return None
    count = len(next(iter(batch.values())))
    rows = (
        count if config.sample_axis == "token" else min(FEW, count)
    )  # the number of tokens does not depend on the rows
    few = {name: value[:rows] for name, value in batch.items()}
    try:
        counted = _count(target, guide, replace(config.alone(), sketch=sketch), autocast, few)
    except ValueError as error:
        if sketch is not None and "nothing to sketch" in str(error):
            return None
        raise
    return round(counted.bytes_sent * count / rows)


def compared_features(
    target: nn.Module,
    guide: nn.Module,
    config: GuidanceConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
    batch: Batch,
) -> list[Compared]:
    """Return the layers that are in a pair."""
    return _count(target, guide, config, autocast, batch).compared


def _count(
    target: nn.Module,
    guide: nn.Module,
    config: GuidanceConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
    batch: Batch,
) -> _Counting:
    batch = {name: value for name, value in batch.items() if name != config.sample_id_column}
    always: dict[str, Any] = {"guidance_schedule": "constant", "guidance_stop_step": None, "guidance_weight": 1.0}
    loss = GuidanceLoss(target, guide, replace(config.alone(), log_measures=[], **always), autocast=autocast)
    try:
        for _ in range(2):  # the first pass finds the layers that are in a pair
            loss.ranks = counting = _Counting()
            with loss.watch(batch) as watched:
                target(**watched.inputs)
    finally:
        loss.close()
    return counting
