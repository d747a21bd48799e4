"""Random strings in splits that never share one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# The hash of all symbols but the last decides the split of a string, whatever the seed, the sizes and the lengths.
# Leaving out the last symbol keeps the few short strings of a split balanced in parity.
TENTHS = {"train": range(2, 10), "eval": range(1), "test": range(1, 2)}
PROBES = 1000  # strings drawn per length to find out whether a split has any


def draw_strings(
    split: str, size: int, *, min_length: int, max_length: int, num_symbols: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw strings of one split, with uniform symbols and uniform lengths among those that the split has.

    Args:
        split: `"train"`, `"eval"` or `"test"`.
        size: Number of strings.
        min_length: Symbols in the shortest string.
        max_length: Symbols in the longest string.
        num_symbols: Size of the alphabet.
        seed: Seed of the draw. Each split draws on its own, so its strings do not depend on the sizes of the others.

    Returns:
        The symbols, `(size, max_length)`, and the lengths, `(size,)`. Ignore symbols after the end of a string.

    Raises:
        ValueError: If a number is too small, or the lengths allow no string of the split.
    """
    if size < 1:
        raise ValueError(f"{split}_size must be at least 1, got {size}")
    if not 1 <= min_length <= max_length:
        raise ValueError(f"lengths must be 1 <= min_length <= max_length, got {min_length} and {max_length}")
    if num_symbols < 2:
        raise ValueError(f"num_symbols must be at least 2, got {num_symbols}")
    probed = np.repeat(np.arange(min_length, max_length + 1), PROBES)
    probes = np.random.default_rng(0).integers(num_symbols, size=(len(probed), max_length))
    possible = np.unique(probed[_belongs(probes, probed, split)])
    if not possible.size:
        raise ValueError(
            f"no string of {min_length} to {max_length} symbols out of {num_symbols} falls into the {split} split: "
            "there are too few such strings; raise max_length"
        )
    rng = np.random.default_rng([seed, list(TENTHS).index(split)])
    lengths = rng.choice(possible, size)
    symbols, foreign = np.empty((size, max_length), dtype=np.int64), np.arange(size)
    while foreign.size:
        symbols[foreign] = rng.integers(num_symbols, size=(foreign.size, max_length))
        foreign = foreign[~_belongs(symbols[foreign], lengths[foreign], split)]
    return symbols, lengths


def string_hash(symbols: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Compute a 64-bit hash of each string, which depends neither on the machine nor on padding after the end.

    Args:
        symbols: `(n, max_length)`.
        lengths: Number of symbols that count, `(n,)`.

    Returns:
        `(n,)`, unsigned.
    """
    powers = np.cumprod(np.full(symbols.shape[1], 0x9E3779B97F4A7C15, dtype=np.uint64))
    digits = np.where(np.arange(symbols.shape[1]) < lengths[:, None], symbols + 1, 0).astype(np.uint64)
    mixed = digits @ powers
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def ragged(matrix: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Convert the first `lengths[i]` entries of each row `i` to a dataset column of lists.

    Args:
        matrix: `(n, width)`.
        lengths: `(n,)`.
    """
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = matrix[np.arange(matrix.shape[1]) < lengths[:, None]]
    return pa.ListArray.from_arrays(offsets, values.astype(np.int32))


def _belongs(symbols: np.ndarray, lengths: np.ndarray, split: str) -> np.ndarray:
    return np.isin(string_hash(symbols, lengths - 1) % np.uint64(10), TENTHS[split])
