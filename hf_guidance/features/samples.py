"""Samples of a layer: batch rows, tokens, or the positions within each row. Padding never counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_guidance.features.batch import Batch
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.distributed import Ranks
from hf_guidance.features.mismatches import why_unlike
from hf_guidance.features.reader import HIDDEN
from hf_guidance.features.rows import INT64_MAX, KINDS, ComparedRows, hashes_of_rows, mix
from hf_guidance.mapping import Pair, pair_name
from hf_guidance.similarity.layers import PRIMAL_BELOW, Layer, flat, layer_of
from hf_guidance.similarity.pair_loss import Groups
from hf_guidance.similarity.sketch import Sketch

Tokens = tuple[Tensor, Tensor, list[int]]  # rows, positions, and the number of tokens of each rank
Choice = list[tuple[Tensor, Tensor]]  # rows and positions, of rows with equally many positions


class Samples(ComparedRows):
    """Samples of one batch, over which the outputs of a network's layers are compared.

    Args:
        batch: Inputs of the network. `attention_mask` `(batch, length)` tells the valid positions. Those of a decoder
            come from `decoder_attention_mask`, else from the labels that are not −100.
        axis: `sequence`, `token` or `within`. `sequence` makes each row one sample, with its positions flattened and
            counted from the first valid one. `token` makes each valid position a sample. `within` does so for each row
            by itself. A document of a packed row is a row.
        max_tokens: Largest number of tokens, all ranks together, or of each row for `within`. They are chosen by a hash
            of row content, position and `seed`, so that row order and padding do not change the choice.
        seed: Seed of that choice.
        skip_first: Number of valid positions at the beginning of each row that are left out.
        rows: Indices of the rows that are compared; None for all.
        least: For `within`, fewest positions of a row that is compared.
        sides: For `within`, whose positions are compared, as `side_of` names them; both if none is named.
        like: Samples of the other network, whose choice of tokens is used.
        ranks: Processes whose batches are taken as one; None for this process alone.
        sketch: Sketch of wide layers.
        primal_below: As of `similarity.layer_of`.
        conventions: Those of the network; without them, its layers have no maps and no frames.

    Attributes:
        count: Number of rows that are compared, over all ranks.

    Raises:
        ValueError: If the batch has no tensors, its valid positions differ from those of `like`, or the batches of the
            ranks differ in length without a mask.
    """

    def __init__(
        self,
        batch: Batch,
        axis: str = "sequence",
        max_tokens: int = 1024,
        seed: int = 0,
        skip_first: int = 0,
        rows: Tensor | None = None,
        least: int = 1,
        sides: Collection[str] = (),
        like: Samples | None = None,
        ranks: Ranks | None = None,
        sketch: Sketch | None = None,
        primal_below: float = PRIMAL_BELOW,
        conventions: Conventions | None = None,
    ) -> None:
        super().__init__(batch, axis, rows, skip_first, least, sides, like, conventions)
        self.max_tokens, self.seed, self.like = max_tokens, seed, like
        self.batch_size = len(self.content)
        self.ranks, self.sketch, self.primal_below = ranks, sketch, primal_below
        self.counts, self.lengths = self._across_ranks()
        self.count = sum(self.counts)
        self._chosen: dict[str | int, Tokens] = {}  # by kind of mask, or number of positions without one
        self._groups: dict[str | int, Choice] = {}
        if like is not None and axis != "sequence":
            self._check_same_tokens(like)

    def layers(self, name: str, features: Tensor, parts: int = 1) -> tuple[Layer, ...]:
        """Make the layers of a layer's output on the batch: one, or for `within` one for each group of rows.

        Args:
            name, features, parts: As of `layer`.

        Raises:
            ValueError: As `layer` does.
        """
        if self.axis != "within":
            return (self.layer(name, features, parts),)
        features, kind = self.prepared(name, features)
        groups = self._grouped(features, kind)
        index = torch.cat([(rows[:, None] * features.shape[1] + positions).flatten() for rows, positions in groups])
        tokens = features.flatten(0, 1).flatten(1)[index.to(features.device)]
        parts_of_groups = tokens.split([positions.numel() for _, positions in groups])
        return tuple(
            layer_of(part.unflatten(0, positions.shape), primal_below=self.primal_below, of_rows=True, in_region=True)
            for part, (_, positions) in zip(parts_of_groups, groups, strict=True)
        )

    def layer(self, name: str, features: Tensor, parts: int = 1) -> Layer:
        """Make a layer of its output on the batch.

        Args:
            name: Name of the layer.
            features: Output of the layer, `(batch, …)`.
            parts: 2 if this is a sketch already.

        Raises:
            ValueError: As `prepared` does.
        """
        given, counts = features, self.counts
        features, kind = self.prepared(name, features)
        precision = features.dtype
        mask, length, sketch = None, None, None
        if self.axis == "token":
            rows, positions, counts = self._tokens(name, features, kind)
            features = features[rows, positions]
        elif kind is not None:
            mask, length = self.valid(kind).to(features.device), self.lengths[kind] - self.skip_first
        if self.sketch and parts == 1:
            sketch = partial(self.sketch, name)
            if mask is None:
                exact = flat(features)
                features = sketch(exact)
                parts = 1 if features is exact else self.sketch.parts
        if self.ranks:
            features = self.ranks.gather(features, counts, length)
            mask = mask if mask is None else self.ranks.gather(mask, counts, length)
        # hidden states are returned to the user, and not overwritten
        copy = not HIDDEN.fullmatch(name) and features.data_ptr() == given.data_ptr()
        return layer_of(
            features,
            mask,
            primal_below=self.primal_below,
            sketch=sketch,
            parts=parts,
            precision=precision,
            copy=copy,
            in_region=True,
        )

    def rows_of_tokens(self) -> Tensor:
        """Return the row of the batch that each compared token comes from, `(n,)`, once a layer is made."""
        return next(iter(self._chosen.values()))[0]

    def check_aligned(self, pairs: Sequence[Pair], layers: Groups, guide: Samples, guides: Groups) -> None:
        """Check that both layers of each pair have the same samples.

        Args:
            pairs: (target layer, guide layer).
            layers: Layers of the target.
            guide: Samples of the guide.
            guides: Layers of the guide.

        Raises:
            ValueError: If they have not.
        """
        for target, other in pairs:
            ours = self.positions.get(target), max(layer.samples for layer in layers[target])
            theirs = guide.positions.get(other), max(layer.samples for layer in guides[other])
            if ours != theirs and self.axis == "sequence":
                raise ValueError(
                    f"pair {pair_name((target, other))}: the target layer gives {ours[1]} samples and the guide layer "
                    f"{theirs[1]}; expected one for each row of the batch. Name layers whose first axis is the batch."
                )
            if ours != theirs:
                missing = self._length_of(target) - guide._length_of(other)
                raise ValueError(
                    f"pair {pair_name((target, other))}: the target layer gives {ours[1]} samples ({ours[0]} positions "
                    f"a row) and the guide layer {theirs[1]} ({theirs[0]}); with sample_axis={self.axis!r} both layers "
                    f"need the same positions. {why_unlike((self, target), (guide, other), missing)}"
                )

    def _length_of(self, name: str) -> int:
        """Return how many positions a layer has, before any is left out."""
        found = self.positions[name]
        return found if isinstance(found, int) else self.lengths[found.removeprefix("the ").removesuffix("'s")]

    def why_too_short(self, needed: int) -> str:
        """Explain why rows of token ids have too few positions to be compared; empty if they have enough.

        Args:
            needed: Fewest samples of the measure.
        """
        content = self.content
        if self.ranks is not None or content.ndim != 2 or content.is_floating_point():
            return ""  # one process alone must not leave a step out; other positions are known after a forward
        left, least = content.shape[1] - self.skip_first, needed if self.axis == "within" else 1
        if left >= least or not (self.skip_first or self.axis == "within"):
            return ""
        if not self.skip_first:
            return (
                f"the rows have {content.shape[1]} positions, and the measure needs {least} in each: set "
                "sample_axis='token', or leave out such rows"
            )
        return (
            f"the rows have {content.shape[1]} positions, of which skip_first_positions={self.skip_first} leaves "
            f"{max(0, left)}, and {least} are needed: lower it, or leave out such rows"
        )

    def leaves_none(self) -> bool:
        """Tell whether `skip_first` leaves no position of the content, in any row."""
        return self.content.ndim > 1 and self.content.shape[1] <= self.skip_first

    # ------------------------------------------------------------------------------------------------------ ranks

    def _across_ranks(self) -> tuple[list[int], dict[str, int]]:
        """Return the number of rows of each rank, and the longest mask of each kind."""
        lengths = {kind: mask.shape[1] for kind, mask in self.masks.items()}
        if self.ranks is None:
            return [self.batch_size], lengths
        own = self.content.shape[1] if 1 < self.content.ndim < 4 else 0  # all images have one size
        numbers = [self.batch_size, own, *(lengths.get(kind, 0) for kind in KINDS)]
        every = self.ranks.numbers(numbers, self.content.device)
        of_kinds = {kind: [row[2 + i] for row in every] for i, kind in enumerate(KINDS)}
        if missing := [kind for kind, found in of_kinds.items() if any(found) and not all(found)]:
            raise ValueError(
                f"some ranks have a mask ({', '.join(missing)}) and some have none: let the data collator return the "
                "same columns in every batch."
            )
        if not lengths and len({row[1] for row in every}) > 1:
            raise ValueError(
                f"the batches of the ranks have sequences of {', '.join(str(row[1]) for row in every)} positions and "
                "no attention_mask, so padding cannot be told apart: add a mask, or pad to a fixed length."
            )
        return [row[0] for row in every], {kind: max(of_kinds[kind]) for kind in lengths}

    # ----------------------------------------------------------------------------------------------------- tokens

    def _check_same_tokens(self, like: Samples) -> None:
        for kind in self.masks.keys() & like.masks.keys():
            mine, theirs = self.masks[kind], like.masks[kind]
            if mine is not theirs and not torch.equal(mine.sum(1), theirs.sum(1)):
                numbers = f"the guide has {int(mine.sum())} valid tokens and the target {int(theirs.sum())}"
                if mine.sum() == theirs.sum():
                    numbers = "the guide has other numbers of valid tokens in some rows than the target"
                raise ValueError(
                    f"sample_axis={self.axis!r}: {numbers}. Use sample_axis='sequence' if the two networks have "
                    "different tokens."
                )

    def _tokens(self, name: str, features: Tensor, kind: str | None) -> Tokens:
        if self.like is not None:
            return self.like._tokens(name, features, kind if kind in self.like.masks else None)
        key = features.shape[1] if kind is None else kind
        if key not in self._chosen:
            where = self._to_choose_from(features, kind)
            rows, positions = choose_tokens(*where, self.max_tokens, self.seed, self.ranks)
            counts = [len(rows)]
            if self.ranks is not None:
                counts = [row[0] for row in self.ranks.numbers(counts, rows.device)]
            self._chosen[key] = rows, positions, counts
        rows, positions, counts = self._chosen[key]
        return rows.to(features.device), positions.to(features.device), counts

    def _grouped(self, features: Tensor, kind: str | None) -> Choice:
        """Return rows and positions of the samples within rows, in groups of rows with equally many."""
        if self.like is not None:
            return self.like._grouped(features, kind if kind in self.like.masks else None)
        key = features.shape[1] if kind is None else kind
        if key not in self._groups:
            self._groups[key] = choose_within_rows(*self._to_choose_from(features, kind), self.max_tokens, self.seed)
        return self._groups[key]

    def _to_choose_from(self, features: Tensor, kind: str | None) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return the valid positions, and what hashes the rows by the mask of the content, whichever the layer's is."""
        everywhere = torch.ones(features.shape[:2], dtype=torch.bool, device=self.content.device)
        return everywhere if kind is None else self.valid(kind), self._hashes

    def _hashes(self) -> Tensor:
        return hashes_of_rows(self.content, self.masks.get("encoder"))


def choose_tokens(
    valid: Tensor, hashes: Callable[[], Tensor], count: int, seed: int, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """Choose tokens by a hash of row content, position and seed, so that row order does not change the choice.

    Args:
        valid: Positions to choose from, `(batch, length)`.
        hashes: Computes the hash of each row, `(batch,)`, if it is needed.
        count: Largest number of tokens, all ranks together.
        seed: Seed of the choice.
        ranks: Processes whose batches are taken as one; None for this process alone.

    Returns:
        Rows and positions of the chosen tokens of this process.
    """
    total = int(valid.sum())
    if ranks is not None:
        total = sum(row[0] for row in ranks.numbers([total], valid.device))
    if total <= count:
        rows, positions = valid.nonzero(as_tuple=True)
        return rows, positions
    score = _scores(valid, hashes(), seed)
    if ranks is not None:
        scores = torch.cat([score.flatten(), score.new_full((count + 1,), INT64_MAX)])
        rows, positions = _below_the_last(score, ranks.smallest(scores, count + 1)).nonzero(as_tuple=True)
        return rows, positions
    smallest, chosen = score.flatten().topk(count + 1, largest=False)
    chosen = chosen[_below_the_last(smallest, smallest)]
    return chosen // valid.shape[1], chosen % valid.shape[1]


def choose_within_rows(
    valid: Tensor, hashes: Callable[[], Tensor], count: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Choose up to `count` positions of each row, as `choose_tokens` does, and group the rows by their number.

    Args:
        valid: Positions to choose from, `(batch, length)`, in front of each row.
        hashes: Computes the hash of each row, `(batch,)`, if it is needed.
        count: Largest number of positions of a row.
        seed: Seed of the choice.

    Returns:
        Groups of rows `(r,)` with positions `(r, n)`, from few positions to many.
    """
    numbers = valid.sum(1)
    groups = []
    for n in numbers.clamp(max=count).unique().tolist():
        rows = (numbers.clamp(max=count) == n).nonzero().flatten()
        if n < count or valid.shape[1] <= count:
            positions = torch.arange(n, device=valid.device).expand(len(rows), n)
        else:
            scores = _scores(valid[rows], hashes()[rows], seed)
            positions = scores.topk(n, dim=1, largest=False).indices.sort(1).values
        groups.append((rows, positions))
    return groups


def _scores(valid: Tensor, hashes: Tensor, seed: int) -> Tensor:
    positions = torch.arange(valid.shape[1], device=valid.device)
    score = mix(hashes[:, None] + mix(positions + 1)[None, :] + seed) & INT64_MAX
    return torch.where(valid, score, INT64_MAX)


def _below_the_last(score: Tensor, smallest: Tensor) -> Tensor:
    """Select the scores below the last of the smallest ones; if there are none, those equal to it.

    Equal rows have equal scores. They are taken or left together, so that the choice does not depend on how rows are
    split over batches.
    """
    last = smallest[-1]
    return torch.where(smallest[0] < last, score < last, score <= last)
