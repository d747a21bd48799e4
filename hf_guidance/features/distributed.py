"""One global batch out of the processes' own: what the similarity of it needs of the other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name


class Ranks:
    """The processes of ``torch.distributed``, whose batches make up one.

    Every rank gets the others' features and computes the same similarity. Its own features keep their gradient, and
    that of the loss is multiplied by the number of ranks (`scale`): the mean over the ranks, which data-parallel
    wrappers take of the gradients, is then the gradient of the similarity of the whole batch, and no backward
    communication is needed.

    Attributes:
        scale: number of ranks.
        bytes_sent: by this rank so far, features and masks, to each of the others.

    Raises:
        ValueError: there is no process group.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "similarity_batch='global' compares over the batches of all processes, and there is no process group: "
                "start with `accelerate launch` or torchrun and several processes (a loop of your own calls "
                "torch.distributed.init_process_group first), or use 'local', which is the same for one process."
            )
        self.rank, self.scale = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0

    def numbers(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Every rank's numbers, as many from each; the host waits for them."""
        mine = torch.tensor(numbers, device=device)
        every = mine.new_empty(self.scale * len(numbers))
        _all_gather(every, mine)
        return every.reshape(self.scale, len(numbers)).tolist()

    def smallest(self, values: Tensor, count: int) -> Tensor:
        """The `count` smallest of all ranks' values ``(m,)``, of which each rank gives `count`."""
        every = values.new_empty(self.scale * count)
        _all_gather(every, values.sort().values[:count].contiguous())
        return every.sort().values[:count]

    def gather(self, x: Tensor, counts: Sequence[int], length: int | None = None) -> Tensor:
        """Samples ``(n, …)`` of all ranks, those of this one with their gradient.

        Args:
            x: this rank's; ``(n, length, …)`` where `length` is given.
            counts: every rank's n.
            length: common length of the second axis, to which it is padded with zeros.
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


def _pad(x: Tensor, axis: int, length: int) -> Tensor:
    missing = length - x.shape[axis]
    if not missing:
        return x
    shape = list(x.shape)
    shape[axis] = missing
    return torch.cat([x, x.new_zeros(shape)], axis)
