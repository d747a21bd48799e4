"""Choice of the rows to compare, by the hashes of their content."""

from __future__ import annotations

from torch import Tensor

from hf_guidance.features.batch import Batch
from hf_guidance.features.distributed import Ranks
from hf_guidance.features.rows import INT64_MAX, content_of, hashes_of_rows, masks_of, mix, tensors_of


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
