"""Sketches of wide features: random projections to few dimensions that keep inner products on average."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_guidance.similarity.layers import without_second_derivative
from hf_guidance.similarity.matrices import for_numpy

SMALL = 2**20  # bytes of features up to which torch's calls cost more than moving the features twice
SMALL_SKETCH = 2**16  # bytes of the sketch up to which that holds; for a larger one each call does more work
NARROW = 2**14  # features per sample up to which that holds for batches of 16 and more
TABLES = 256  # tables of signs to keep; padded rows have another width in every batch


class Sketch:
    """Random projection of features `(n, d)` to `(n, size)`, in two independent halves.

    Each half is a count sketch: it adds each feature, with a random sign, to one of `size // 2` sums. It is linear, and
    unbiased for the Gram matrix: `E⟨Sx, Sy⟩ = ⟨x, y⟩`. Over all pairs of samples, the relative error of the Gram matrix
    K has a mean square of at most `(r + 1) / size`. Here `r = tr(K)² / ‖K‖²` is the participation ratio of the centred
    features, roughly the number of directions they spread over. Layers no wider than `size` are not sketched.

    The square of a sketched Gram matrix is larger than that of K on average, by as much. The product of those of the
    two halves is not: `E⟨K₁, K₂⟩ = ‖K‖²`. That is why there are two.

    Signs and sums depend only on the layer's name and width, the network's role, and `size`. So all runs, ranks and
    stored features share them, and guide and target never do.

    Args:
        size: Dimensions to project each sample to, at least 2.
        role: `target` or `guide`.
        parts: 2; or 1 for the sketch of earlier versions, whose features a cache may hold: one part, its signs shared
            by both networks.

    Source: Charikar, Chen, Farach-Colton 2002 (count sketch); the variance is Weinberger et al. 2009, lemma 2.
    """

    def __init__(self, size: int, role: str = "target", parts: int = 2) -> None:
        self.size, self.role, self.parts = size // parts * parts, role, parts
        self.widest = 0  # width of the widest layer seen so far
        self._tables: dict[tuple[str, int, torch.device], list[_Table]] = {}

    def sketches(self, width: int) -> bool:
        """Tell whether layers of this width are sketched."""
        return width > self.size

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Sketch a layer's features, in float32 or float64; differentiable.

        Args:
            name: Name of the layer, by which the signs are drawn.
            x: Features `(n, d)`.

        Returns:
            `(n, size)`, the two halves over √2 side by side; or the features themselves if they are no wider than that.
        """
        width = x.shape[1]
        self.widest = max(self.widest, width)
        if not self.sketches(width):
            return x
        key = (name, width, x.device)
        if key not in self._tables:
            if len(self._tables) >= TABLES:
                del self._tables[next(iter(self._tables))]
            seeds = [f"{self.role} {name} {half}" for half in range(self.parts)] if self.parts > 1 else [name]
            self._tables[key] = [_draw(seed, width, self.size // self.parts, x.device) for seed in seeds]
        x = x if x.dtype == torch.float64 else x.float()
        sketched = [_CountSketch.apply(x, self.size // self.parts, table) for table in self._tables[key]]
        return sketched[0] if self.parts == 1 else torch.cat(sketched, 1) * 0.5**0.5


def _draw(name: str, width: int, size: int, device: torch.device) -> _Table:
    """Draw a sign for each feature, and a rotation of the sums for each block of `size` features."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {width} {size}".encode()))
    signs = torch.randint(2, (width,), generator=generator).to(device, torch.float32) * 2 - 1
    shifts = torch.randint(size, (-(-width // size),), generator=generator).to(device)
    table = _Table(signs, shifts, _pieces(width, size, shifts.tolist()))
    if width % size or width > NARROW:
        return table
    blocks = torch.arange(width, device=device) // size * size
    order = (blocks + _sums(table, size)).argsort()
    return table._replace(moves=(order, signs[order]))


class _Table(NamedTuple):
    """Signs of a layer's features, and the sums to add them to.

    Args:
        signs: Sign of each feature, float32.
        shifts: Rotation of each block.
        pieces: (first, end, first sum) of each run of features that go to neighbouring sums.
        moves: Order of the features by block and then by sum, and their signs in that order. None for wide layers, and
            for layers whose last block is shorter.
    """

    signs: Tensor
    shifts: Tensor
    pieces: list[tuple[int, int, int]]
    moves: tuple[Tensor, Tensor] | None = None


class _CountSketch(torch.autograd.Function):
    """Count sketch that adds feature j of block b to sum `(j + shift_b) mod size`.

    Two features of different blocks collide with probability 1 / size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, table: _Table) -> Tensor:
        ctx.table, ctx.size = table, size
        if x.device.type != "cpu":  # many small operations cost more there than moving the features twice
            return x.new_zeros(len(x), size).index_add_(1, _sums(table, size), x * table.signs.to(x))
        small = x.nbytes <= SMALL and x.element_size() * len(x) * size <= SMALL_SKETCH
        if small and table.moves:
            order, signs_in_order = table.moves
            return x.index_select(1, order).mul_(signs_in_order).view(len(x), -1, size).sum(1)
        signs, sums = table.signs.to(x), x.new_empty(len(x), size)
        for begin, end, to in table.pieces:
            if begin < size:  # the first block is as wide as the sums, and sets them
                torch.mul(x[:, begin:end], signs[begin:end], out=sums[:, to : to + end - begin])
            else:
                sums[:, to : to + end - begin].addcmul_(x[:, begin:end], signs[begin:end])
        return sums

    @staticmethod
    @without_second_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        table, signs = ctx.table, ctx.table.signs.to(gradient)
        if not for_numpy(gradient):
            return gradient[:, _sums(table, ctx.size)] * signs, None, None
        spread = gradient.new_empty(len(gradient), len(signs))
        into, given = spread.numpy(), gradient.numpy()  # numpy's calls cost less than torch's
        for begin, end, to in table.pieces:
            into[:, begin:end] = given[:, to : to + end - begin]
        return spread.mul_(signs), None, None


def _sums(table: _Table, size: int) -> Tensor:
    """Return the index of the sum that each feature goes to."""
    feature = torch.arange(len(table.signs), device=table.signs.device)
    return (feature + table.shifts[feature // size]) % size


def _pieces(width: int, size: int, shifts: list[int]) -> list[tuple[int, int, int]]:
    pieces = []
    for block, shift in enumerate(shifts):
        begin, end = block * size, min((block + 1) * size, width)
        turn = min(begin + size - shift, end)
        pieces += [(begin, turn, shift), (turn, end, 0)]
    return [piece for piece in pieces if piece[0] < piece[1]]
