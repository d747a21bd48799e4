"""Samples of a layer: batch rows, tokens, or the positions within each row. Padding never counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hf_guidance.features.distributed import Ranks
from hf_guidance.features.reader import HIDDEN
from hf_guidance.features.rows import (
    Batch,
    choose_tokens,
    choose_within_rows,
    content_of,
    documents_of,
    first_valid,
    hashes_of_rows,
    in_front,
    masks_of,
    over,
    tensors_of,
    unpacked,
)
from hf_guidance.mapping import Pair, pair_name
from hf_guidance.similarity.layers import PRIMAL_BELOW, Layer, flat, layer_of
from hf_guidance.similarity.pair_loss import Groups
from hf_guidance.similarity.sketch import Sketch

Tokens = tuple[Tensor, Tensor, list[int]]  # rows, positions, and the number of tokens of each rank
Choice = list[tuple[Tensor, Tensor]]  # rows and positions, of rows with equally many positions


class Samples:
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
        like: Samples of the other network, whose choice of tokens is used.
        ranks: Processes whose batches are taken as one; None for this process alone.
        sketch: Sketch of wide layers.
        primal_below: As of `similarity.layer_of`.

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
        like: Samples | None = None,
        ranks: Ranks | None = None,
        sketch: Sketch | None = None,
        primal_below: float = PRIMAL_BELOW,
    ) -> None:
        self.axis, self.max_tokens, self.seed, self.skip_first, self.like = axis, max_tokens, seed, skip_first, like
        self.rows, self._of, self._documents = rows, len(content_of(batch)), documents_of(batch)
        self.content, self.masks = content_of(batch), masks_of(tensors_of(batch))
        if self._documents:
            lengths = torch.tensor([place.stop - place.start for place in self._documents])
            self.content = unpacked(self._documents, self.content)
            self.masks = {"encoder": (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.content.device)}
        elif rows is not None:
            self._take(rows)
        self.kept: Tensor | None = None  # for `within`, the rows with enough positions
        if axis == "within" and self.masks:
            self.kept = self._with_positions(least) if like is None else like.kept
        if self.kept is not None:
            self._take(self.kept)
        self.batch_size = len(self.content)
        self.ranks, self.sketch, self.primal_below = ranks, sketch, primal_below
        self.counts, self.lengths = self._across_ranks()
        self.count = sum(self.counts)
        self.positions: dict[str, int | str] = {}  # mask or number of positions of a layer's tokens; equal in a pair
        self._orders: dict[str, Tensor | None] = {}
        self._chosen: dict[str | int, Tokens] = {}  # by kind of mask, or number of positions without one
        self._groups: dict[str | int, Choice] = {}
        self._least = least
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
        features, kind = self._prepared(name, features)
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
            ValueError: If the first axis of the output is not the batch, or its length is not that of the mask.
        """
        given, counts = features, self.counts
        features, kind = self._prepared(name, features)
        precision = features.dtype
        mask, length, sketch = None, None, None
        if self.axis == "token":
            rows, positions, counts = self._tokens(name, features, kind)
            features = features[rows, positions]
        elif kind is not None:
            mask, length = self._valid(kind).to(features.device), self.lengths[kind] - self.skip_first
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
            ours = self.positions.get(target), sum(layer.samples for layer in layers[target])
            theirs = guide.positions.get(other), sum(layer.samples for layer in guides[other])
            if ours != theirs:
                raise ValueError(
                    f"pair {pair_name((target, other))}: the target layer gives {ours[1]} samples ({ours[0]} positions "
                    f"a row) and the guide layer {theirs[1]} ({theirs[0]}); with sample_axis={self.axis!r} both layers "
                    "need the same positions. Use sample_axis='sequence'."
                )

    def why_too_few(self, measure: str, needed: int, count: int, packed: bool = False) -> str:
        """Explain why a batch of `count` samples is not guided, and what to do about it."""
        way_out = "set sample_axis='token'" if packed else "raise per_device_train_batch_size"
        if self.axis == "within":
            return (
                f"{measure} needs at least {needed} valid positions in a row, and no row of the batch has so many: set "
                "sample_axis='token'"
            )
        if self.axis == "token":
            kind = "valid tokens"
        else:
            kind = "row" if count == 1 else "rows"
            if packed:
                kind += ", into which documents are packed"
            else:
                way_out += ", or set dataloader_drop_last=True if it is an epoch's last batch"
        return f"{measure} needs at least {needed} samples, and the batch has {count} {kind}: {way_out}"

    # ------------------------------------------------------------------------------------------------------ ranks

    def _across_ranks(self) -> tuple[list[int], dict[str, int]]:
        """Return the number of rows of each rank, and the longest mask of each kind."""
        lengths = {kind: mask.shape[1] for kind, mask in self.masks.items()}
        if self.ranks is None:
            return [self.batch_size], lengths
        own = self.content.shape[1] if self.content.ndim < 4 else 0  # all images have one size
        every = self.ranks.numbers([self.batch_size, own, *lengths.values()], self.content.device)
        if not lengths and len({row[1] for row in every}) > 1:
            raise ValueError(
                f"the batches of the ranks have sequences of {', '.join(str(row[1]) for row in every)} positions and "
                "no attention_mask, so padding cannot be told apart: add a mask, or pad to a fixed length."
            )
        longest = {kind: max(row[2 + i] for row in every) for i, kind in enumerate(lengths)}
        return [row[0] for row in every], longest

    # ---------------------------------------------------------------------------------------------------- padding

    def _kind_of_mask(self, name: str, features: Tensor) -> str | None:
        """Return which mask describes the positions of a layer; None if it has no positions or there is no mask."""
        if not self.masks or features.ndim < 3:
            return None
        fitting = [kind for kind, mask in self.masks.items() if mask.shape[1] == features.shape[1]]
        if not fitting:
            lengths = ", ".join(f"{kind} {mask.shape[1]}" for kind, mask in self.masks.items())
            raise ValueError(
                f"layer {name!r} has {features.shape[1]} positions, but the mask has another number ({lengths}), so "
                "padding cannot be told apart: choose a layer with one position per token."
            )
        is_encoder = {"encoder", "encoder_hidden_states"} & set(name.split("."))
        side = "encoder" if is_encoder else "decoder"
        return side if side in fitting else fitting[0]

    def _prepared(self, name: str, features: Tensor) -> tuple[Tensor, str | None]:
        """Return the compared rows of a layer's output, their valid positions in front, and the kind of their mask."""
        if not isinstance(features, Tensor) or features.ndim < 2 or features.shape[0] != self._of:
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"layer {name!r} gave {got}; expected a tensor with the batch's {self._of} samples on its "
                "first axis. Guide and target see the same rows; choose another layer if this one is not batch-first."
            )
        if self._documents:
            if features.ndim < 3 or features.shape[1] != self._documents[-1].stop:
                raise ValueError(
                    f"layer {name!r} gave shape {tuple(features.shape)}, but the batch is one row of "
                    f"{len(self._documents)} documents: choose a layer with one position per token, or pad the rows."
                )
            features = unpacked(self._documents, features)
        for rows in (self.rows, self.kept):
            if rows is not None:
                features = features[rows.to(features.device)]
        by_position = self.axis != "sequence"
        is_map = by_position and features.ndim == 4  # (batch, channels, h, w): a position is a place in the image
        if is_map:
            features = features.flatten(2).transpose(1, 2)
        if by_position and features.ndim < 3:
            raise ValueError(
                f"layer {name!r} gave shape {tuple(features.shape)}, which has no positions; sample_axis="
                f"{self.axis!r} needs (batch, length, d). Use sample_axis='sequence' or another layer."
            )
        kind = self._kind_of_mask(name, features)
        if kind is not None:
            features = self._aligned(features, kind)
        if self.skip_first and features.ndim == 3 and not is_map:
            features = self._without_first(name, features)
        if by_position:
            self.positions[name] = features.shape[1] if kind is None else f"the {kind}'s"
        if self.axis == "within" and kind is None and features.shape[1] < self._least:
            raise ValueError(
                f"layer {name!r} has {features.shape[1]} positions in a row, and the measure needs {self._least}: use "
                "another layer or sample_axis='sequence'."
            )
        return features, kind

    def _take(self, rows: Tensor) -> None:
        self.content = self.content[rows.to(self.content.device)]
        self.masks = {kind: mask[rows.to(mask.device)] for kind, mask in self.masks.items()}

    def _with_positions(self, least: int) -> Tensor | None:
        """Return the rows with enough valid positions; None for all."""
        numbers = torch.stack([mask.sum(1) for mask in self.masks.values()]).amin(0) - self.skip_first
        kept = (numbers >= least).nonzero().flatten()
        return None if len(kept) == len(numbers) else kept

    def _aligned(self, features: Tensor, kind: str) -> Tensor:
        """Move each row's valid positions to its front, in their order."""
        if kind not in self._orders:
            self._orders[kind] = in_front(self.masks[kind])
        order = self._orders[kind]
        return features if order is None else features.take_along_dim(over(order.to(features.device), features), dim=1)

    def _valid(self, kind: str) -> Tensor:
        """Return which positions count, `(batch, length)`, once valid ones are in front and the first are left out."""
        return first_valid(self.masks[kind])[:, self.skip_first :]

    def _without_first(self, name: str, features: Tensor) -> Tensor:
        if features.shape[1] <= self.skip_first:
            raise ValueError(
                f"skip_first_positions is {self.skip_first}, but layer {name!r} has {features.shape[1]} positions: "
                "lower it, so that some are left."
            )
        return features[:, self.skip_first :]

    # ----------------------------------------------------------------------------------------------------- tokens

    def _check_same_tokens(self, like: Samples) -> None:
        for kind in self.masks.keys() & like.masks.keys():
            mine, theirs = self.masks[kind], like.masks[kind]
            if mine is not theirs and not torch.equal(mine.sum(1), theirs.sum(1)):
                raise ValueError(
                    f"sample_axis={self.axis!r}: the guide has {int(mine.sum())} valid tokens and the target "
                    f"{int(theirs.sum())}, or the numbers differ in some rows. Use sample_axis='sequence' if the two "
                    "networks have different tokens, or if guide_input='shuffled' pairs rows of different lengths."
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

    def _to_choose_from(self, features: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Return the valid positions, and the rows' hashes, by the mask of the content whichever the layer's is."""
        everywhere = torch.ones(features.shape[:2], dtype=torch.bool, device=self.content.device)
        hashes = hashes_of_rows(self.content, self.masks.get("encoder"))
        return everywhere if kind is None else self._valid(kind), hashes
