"""A sketch of wide features: few numbers a sample, whose products are on average those of the features themselves."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_guidance.similarity.grams import without_second_derivative
from hf_guidance.similarity.numpy_products import for_numpy

SMALL = 2**20  # bytes of features, up to which torch's calls cost more than to move them twice
SMALL_SKETCH = 2**16  # bytes of their sketch, up to which that is so: for a larger one each of the calls does more
NARROW = 2**14  # features of a sample, of which that holds for batches of 16 and more
TABLES = 256  # of signs, that are kept: padded rows have another width in every batch


class Sketch:
    """Count sketch of features ``(n, d)`` to ``(n, size)``: each is added, with a random sign, to one of ``size`` sums.

    It is linear, and unbiased for the Gram matrix: ``E⟨Sx, Sy⟩ = ⟨x, y⟩`` with a variance of at most
    ``(‖x‖²‖y‖² + ⟨x, y⟩²) / size``. Over all pairs of samples, the Gram matrix K has a relative error whose mean square
    is at most ``(r + 1) / size``; ``r = tr(K)² / ‖K‖²`` is the participation ratio of the centred features,
    about the number of directions they spread over. Layers no wider than ``size`` are left as they are.

    Signs and sums are drawn by the layer's name and width alone: all runs, ranks and stored features share them.

    Args:
        size: numbers kept of a sample.

    Source: Charikar, Chen, Farach-Colton 2002 (count sketch); the variance is Weinberger et al. 2009, lemma 2.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.widest = 0  # layer seen so far
        self._tables: dict[tuple[str, int, torch.device], _Table] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """The sketch of a layer's features, in float32 or better; differentiable."""
        width = x.shape[1]
        self.widest = max(self.widest, width)
        if width <= self.size:
            return x
        key = (name, width, x.device)
        if key not in self._tables:
            if len(self._tables) >= TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = self._draw(name, width, x.device)
        return _CountSketch.apply(x if x.dtype == torch.float64 else x.float(), self.size, self._tables[key])

    def _draw(self, name: str, width: int, device: torch.device) -> _Table:
        """A sign for each feature, and for each block of ``size`` features by how much its sums are rotated."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {width} {self.size}".encode()))
        signs = torch.randint(2, (width,), generator=generator).to(device, torch.float32) * 2 - 1
        shifts = torch.randint(self.size, (-(-width // self.size),), generator=generator).to(device)
        table = _Table(signs, shifts, _pieces(width, self.size, shifts.tolist()))
        if width % self.size or width > NARROW:
            return table
        blocks = torch.arange(width, device=device) // self.size * self.size
        order = (blocks + _sums(table, self.size)).argsort()
        return table._replace(moves=(order, signs[order]))


class _Table(NamedTuple):
    """Where the features of a layer go.

    Args:
        signs: of each, float32.
        shifts: of each block.
        pieces: (first, end, first sum) of the runs of features that go to neighbouring sums.
        moves: order of the features, by block and then by sum, and their signs in it; None for wide layers, and where
            the last block is shorter.
    """

    signs: Tensor
    shifts: Tensor
    pieces: list[tuple[int, int, int]]
    moves: tuple[Tensor, Tensor] | None = None


class _CountSketch(torch.autograd.Function):
    """Feature j of block b goes to sum ``(j + shift_b) mod size``: two features collide with a chance of 1 / size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, table: _Table) -> Tensor:
        ctx.table, ctx.size = table, size
        if x.device.type != "cpu":  # where many small steps cost more than moving the features twice
            return x.new_zeros(len(x), size).index_add_(1, _sums(table, size), x * table.signs.to(x))
        small = x.nbytes <= SMALL and x.element_size() * len(x) * size <= SMALL_SKETCH
        if small and table.moves:
            order, signs_in_order = table.moves
            return x.index_select(1, order).mul_(signs_in_order).view(len(x), -1, size).sum(1)
        signs, sums = table.signs.to(x), x.new_empty(len(x), size)
        for begin, end, to in table.pieces:
            if begin < size:  # the first block, which is as wide as the sums
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
        into, given = spread.numpy(), gradient.numpy()  # whose calls cost less than torch's
        for begin, end, to in table.pieces:
            into[:, begin:end] = given[:, to : to + end - begin]
        return spread.mul_(signs), None, None


def _sums(table: _Table, size: int) -> Tensor:
    """Which sum each feature goes to."""
    feature = torch.arange(len(table.signs), device=table.signs.device)
    return (feature + table.shifts[feature // size]) % size


def _pieces(width: int, size: int, shifts: list[int]) -> list[tuple[int, int, int]]:
    pieces = []
    for block, shift in enumerate(shifts):
        begin, end = block * size, min((block + 1) * size, width)
        turn = min(begin + size - shift, end)
        pieces += [(begin, turn, shift), (turn, end, 0)]
    return [piece for piece in pieces if piece[0] < piece[1]]
