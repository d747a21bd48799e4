"""Choice of the rows to compare, by hashes of their content: neither order nor padding matters."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_guidance.features.batch import Batch
from hf_guidance.features.distributed import Ranks
from hf_guidance.features.rows import content_of, first_valid, in_front, masks_of, over, tensors_of

INT64_MAX = torch.iinfo(torch.int64).max
MOST_HASHED = 256  # of an image at least so many numbers are hashed, at even distances


def choose_rows(batch: Batch, count: int, seed: int, ranks: Ranks | None = None) -> Tensor | None:
    """Choose rows of a batch by a hash of their content and a seed, so that their order does not change the choice.

    Args:
        batch: Inputs of a network.
        count: Number of rows, all ranks together.
        seed: Seed of the choice.
        ranks: Processes whose batches are taken as one; None for this process alone.

    Returns:
        Indices of the chosen rows of this process in ascending order, `(k,)`; None if the batch has no more than that.

    Raises:
        ValueError: If a column has no entry for each row.
    """
    lengths = {name: len(value) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "guide_rows runs the guide on some rows, so each column needs one entry for each row, but their lengths "
            f"are {lengths}: leave guide_rows out."
        )
    content = content_of(batch)
    mask = masks_of(tensors_of(batch)).get("encoder")
    scores = mix(hashes_of_rows(content, mask) + seed) & INT64_MAX
    sizes, first = [len(scores)], 0
    if ranks is not None:
        sizes = [row[0] for row in ranks.numbers(sizes, scores.device)]
        first = sum(sizes[: ranks.rank])
        scores = ranks.gather(scores, sizes)
    if len(scores) <= count:
        return None
    chosen = scores.argsort(stable=True)[:count].sort().values - first
    return chosen[(chosen >= 0) & (chosen < len(content))]


def hashes_of_rows(content: Tensor, mask: Tensor | None) -> Tensor:
    """Compute a hash of each row, `(batch,)`, that depends neither on padding nor on the order of the rows.

    Args:
        content: Content of the rows, `(batch, …)`.
        mask: Its valid positions `(batch, length)`, if they are told apart.
    """
    if mask is None or content.shape[:2] != mask.shape:
        return hashes_of(content)
    valid = over(first_valid(mask), content)
    order = in_front(mask)
    return hashes_of(content if order is None else content.take_along_dim(over(order, content), dim=1), valid)


def hashes_of(content: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute a hash of each row's content, `(batch,)`, that does not depend on padding.

    Of many pixels an even sample is enough to tell images apart.

    Args:
        content: Rows `(batch, …)`.
        valid: Which entries count, spread over the content; None for all.
    """
    if content.is_floating_point():
        if valid is None:
            content = content[:, None].flatten(1)
            content = content[:, :: max(1, content.shape[1] // MOST_HASHED)]
        content = content.float().contiguous().view(torch.int32)
    if valid is not None:
        content = torch.where(valid, content, -1)
    content = content[:, None].flatten(1).long()  # rows may have one axis
    places = mix(torch.arange(content.shape[1], device=content.device) + 1)
    return torch.where(content == -1, 0, mix(content + places)).sum(1)


def mix(value: Tensor) -> Tensor:
    """Hash int64 values to all 64 bits. Products wrap around."""
    for factor in (-7046029254386353131, -4658895280553007687):
        value = value ^ (value >> 29)
        value *= factor
    return value ^ (value >> 32)
