"""Similarities over a global batch: the features of all processes as one batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

# older versions of torch have only the second name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """Processes of `torch.distributed`, whose batches form one batch.

    Each rank gathers the features of the others and computes the same similarity. Only its own features carry a
    gradient. Multiply the gradient of the loss by the number of ranks (`scale`). Data-parallel wrappers average
    gradients over the ranks, and that average is then the gradient for the whole batch. The backward needs no
    communication.

    Attributes:
        rank: Number of this process.
        scale: Number of ranks.
        bytes_sent: Bytes of features and masks that this rank has sent so far, to each of the others.

    Raises:
        ValueError: If there is no process group.
    """

    def __init__(self) -> None:
        if not _is_group():
            raise ValueError("there is no process group: call torch.distributed.init_process_group first.")
        self.rank, self.scale = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0

    def numbers(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Gather integers from all ranks. The host waits for them.

        Args:
            numbers: This rank's integers; each rank gives equally many.
            device: Device to communicate on.

        Returns:
            The integers of each rank, in the order of the ranks.
        """
        mine = torch.tensor(numbers, device=device)
        every = mine.new_empty(self.scale * len(numbers))
        _all_gather(every, mine)
        return every.reshape(self.scale, len(numbers)).tolist()

    def smallest(self, values: Tensor, count: int) -> Tensor:
        """Return the `count` smallest values of all ranks. Each rank gives at least `count` values `(m,)`."""
        every = values.new_empty(self.scale * count)
        _all_gather(every, values.sort().values[:count].contiguous())
        return every.sort().values[:count]

    def gather(self, x: Tensor, counts: Sequence[int], length: int | None = None) -> Tensor:
        """Gather samples `(n, …)` from all ranks. Those of this rank keep their gradient.

        Args:
            x: Samples of this rank; `(n, length, …)` if `length` is given.
            counts: Number of samples of each rank.
            length: Common length to which the second axis is padded with zeros.

        Returns:
            `(sum of counts, …)`, in the order of the ranks.
        """
        if length is not None:
            x = _pad(x, 1, length)
        kind = torch.uint8 if x.dtype == torch.bool else x.dtype
        mine = _pad(x.detach(), 0, max(counts)).contiguous().to(kind)
        every = mine.new_empty(self.scale * max(counts), *mine.shape[1:])
        _all_gather(every, mine)
        self.bytes_sent += mine.nbytes
        parts = [part[:n].to(x.dtype) for part, n in zip(every.split(max(counts)), counts, strict=True)]
        parts[self.rank] = x
        return torch.cat(parts)


def ranks_of(similarity_batch: str) -> Ranks | None:
    """Return the processes whose batches a similarity takes as one; None for this process alone.

    A single process without a process group compares its own batch, and says so once.

    Args:
        similarity_batch: As of `GuidanceConfig`.

    Raises:
        ValueError: If several processes were started for a global batch, and they form no group.
    """
    if similarity_batch != "global":
        return None
    if _is_group():
        return Ranks()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise ValueError(
            f"similarity_batch='global' compares over the batches of all processes, and {started} were started, but "
            "there is no process group: call torch.distributed.init_process_group before you make the loss, or use "
            "similarity_batch='local'."
        )
    _say_that_it_is_local()
    return None


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@cache
def _say_that_it_is_local() -> None:
    logger.info("similarity_batch='global' compares over the batch of this process, because it is the only one.")


def _pad(x: Tensor, axis: int, length: int) -> Tensor:
    missing = length - x.shape[axis]
    if not missing:
        return x
    shape = list(x.shape)
    shape[axis] = missing
    return torch.cat([x, x.new_zeros(shape)], axis)


def runs_alone(network: nn.Module) -> bool:
    """Tell whether a network can run on one process while the others do not run it: none of its weights is sharded."""
    if not _is_group():
        return True
    # DeepSpeed ZeRO-3 marks the weights, FSDP 1 the modules; FSDP 2 and tensor parallelism keep DTensors
    sharded = any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in network.parameters())
    return not sharded and not any(hasattr(module, "_is_fsdp_managed_module") for module in network.modules())
