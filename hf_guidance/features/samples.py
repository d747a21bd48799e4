"""Samples of a layer: batch rows or tokens. Padding never counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_guidance.features.distributed import Ranks
from hf_guidance.features.reader import HIDDEN
from hf_guidance.features.rows import (
    INT64_MAX,
    Batch,
    content_of,
    first_valid,
    hashes_of_rows,
    in_front,
    masks_of,
    mix,
    over,
    take_rows,
    tensors_of,
)
from hf_guidance.mapping import Pair, pair_name
from hf_guidance.similarity.layers import PRIMAL_BELOW, Layer, flat, layer_of
from hf_guidance.similarity.sketch import Sketch

Tokens = tuple[Tensor, Tensor, list[int]]  # rows, positions, and the number of tokens of each rank


class Samples:
    """Samples of one batch, over which the outputs of a network's layers are compared.

    Args:
        batch: Inputs of the network. `attention_mask` `(batch, length)` tells the valid positions. Those of a decoder
            come from `decoder_attention_mask`, else from the labels that are not −100.
        axis: `sequence` or `token`. `sequence` makes each row one sample, with its positions flattened and counted from
            the first valid one. `token` makes each valid position a sample.
        max_tokens: Largest number of tokens, all ranks together. They are chosen by a hash of row content, position and
            `seed`, so that row order and padding do not change the choice.
        seed: Seed of that choice.
        skip_first: Number of valid positions at the beginning of each row that are left out.
        rows: Indices of the rows that are compared; None for all.
        like: Samples of the other network, whose choice of tokens is used.
        ranks: Processes whose batches are taken as one; None for this process alone.
        sketch: Sketch of wide layers.
        primal_below: As of `similarity.layer_of`.

    Attributes:
        count: Number of rows, over all ranks.

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
        like: Samples | None = None,
        ranks: Ranks | None = None,
        sketch: Sketch | None = None,
        primal_below: float = PRIMAL_BELOW,
    ) -> None:
        self.rows, self._of = rows, len(content_of(batch))
        batch = batch if rows is None else take_rows(batch, rows)
        self.content = content_of(batch)
        self.batch_size = self.content.shape[0]
        self.axis, self.max_tokens, self.seed, self.skip_first, self.like = axis, max_tokens, seed, skip_first, like
        self.masks = masks_of(tensors_of(batch))
        self.ranks, self.sketch, self.primal_below = ranks, sketch, primal_below
        self.counts, self.lengths = self._across_ranks()
        self.count = sum(self.counts)
        self.positions: dict[str, int | str] = {}  # mask or number of positions of a layer's tokens; equal in a pair
        self._orders: dict[str, Tensor | None] = {}
        self._chosen: dict[str | int, Tokens] = {}  # by kind of mask, or number of positions without one
        if like is not None and axis == "token":
            self._check_same_tokens(like)

    def layer(self, name: str, features: Tensor, parts: int = 1) -> Layer:
        """Make a layer of its output on the batch.

        Args:
            name: Name of the layer.
            features: Output of the layer, `(batch, …)`.
            parts: 2 if this is a sketch already.

        Raises:
            ValueError: If the first axis of the output is not the batch, or its length is not that of the mask.
        """
        if not isinstance(features, Tensor) or features.ndim < 2 or features.shape[0] != self._of:
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"layer {name!r} gave {got}; expected a tensor with the batch's {self._of} samples on its "
                "first axis. Guide and target see the same rows; choose another layer if this one is not batch-first."
            )
        given, precision, counts = features, features.dtype, self.counts
        if self.rows is not None:
            features = features[self.rows.to(features.device)]
        is_map = self.axis == "token" and features.ndim == 4  # (batch, channels, h, w): a token is a place in the image
        if is_map:
            features = features.flatten(2).transpose(1, 2)
        kind = self._kind_of_mask(name, features)
        if kind is not None:
            features = self._aligned(features, kind)
        if self.skip_first and features.ndim == 3 and not is_map:
            features = self._without_first(name, features)
        mask, length, sketch = None, None, None
        if self.axis == "token":
            self.positions[name] = features.shape[1] if kind is None else f"the {kind}'s"
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

    def check_aligned(
        self, pairs: Sequence[Pair], layers: Mapping[str, Layer], guide: Samples, guides: Mapping[str, Layer]
    ) -> None:
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
            ours = self.positions.get(target), layers[target].samples
            theirs = guide.positions.get(other), guides[other].samples
            if ours != theirs:
                raise ValueError(
                    f"pair {pair_name((target, other))}: the target layer gives {ours[1]} samples ({ours[0]} positions "
                    f"a row) and the guide layer {theirs[1]} ({theirs[0]}); with sample_axis='token' both layers need "
                    "the same positions. Use sample_axis='sequence'."
                )

    def why_too_few(self, measure: str, needed: int, count: int, packed: bool = False) -> str:
        """Explain why a batch of `count` samples is not guided, and what to do about it."""
        way_out = "set sample_axis='token'" if packed else "raise per_device_train_batch_size"
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
                    f"sample_axis='token': the guide has {int(mine.sum())} valid tokens and the target "
                    f"{int(theirs.sum())}, or the numbers differ in some rows. Use sample_axis='sequence' if the two "
                    "networks have different tokens, or if guide_input='shuffled' pairs rows of different lengths."
                )

    def _tokens(self, name: str, features: Tensor, kind: str | None) -> Tokens:
        if features.ndim < 3:
            raise ValueError(
                f"layer {name!r} gave shape {tuple(features.shape)}, which has no positions; "
                "sample_axis='token' needs (batch, length, d). Use sample_axis='sequence' or another layer."
            )
        if self.like is not None:
            return self.like._tokens(name, features, kind if kind in self.like.masks else None)
        key = features.shape[1] if kind is None else kind
        if key not in self._chosen:
            everywhere = torch.ones(features.shape[:2], dtype=torch.bool, device=self.content.device)
            rows, positions = self._choose(everywhere if kind is None else self._valid(kind))
            counts = [len(rows)]
            if self.ranks is not None:
                counts = [row[0] for row in self.ranks.numbers(counts, rows.device)]
            self._chosen[key] = rows, positions, counts
        rows, positions, counts = self._chosen[key]
        return rows.to(features.device), positions.to(features.device), counts

    def _choose(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the (rows, positions) of the tokens to compare."""
        total = int(valid.sum())
        if self.ranks is not None:
            total = sum(row[0] for row in self.ranks.numbers([total], self.content.device))
        if total <= self.max_tokens:
            rows, positions = valid.nonzero(as_tuple=True)
            return rows, positions
        positions = torch.arange(valid.shape[1], device=valid.device)
        # the mask of the content, whichever layer the tokens are chosen for
        hashes = hashes_of_rows(self.content, self.masks.get("encoder"))
        score = mix(hashes[:, None] + mix(positions + 1)[None, :] + self.seed) & INT64_MAX
        score = torch.where(valid, score, INT64_MAX)
        if self.ranks is not None:
            scores = torch.cat([score.flatten(), score.new_full((self.max_tokens + 1,), INT64_MAX)])
            rows, positions = _below_the_last(score, self.ranks.smallest(scores, self.max_tokens + 1)).nonzero(
                as_tuple=True
            )
            return rows, positions
        smallest, chosen = score.flatten().topk(self.max_tokens + 1, largest=False)
        chosen = chosen[_below_the_last(smallest, smallest)]
        return chosen // valid.shape[1], chosen % valid.shape[1]


def _below_the_last(score: Tensor, smallest: Tensor) -> Tensor:
    """Select the scores below the last of the smallest ones; if there are none, those equal to it.

    Equal rows have equal scores. They are taken or left together, so that the choice does not depend on how rows are
    split over batches.
    """
    last = smallest[-1]
    return torch.where(smallest[0] < last, score < last, score <= last)
