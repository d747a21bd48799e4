"""Samples of a layer: batch rows or tokens. Padding never counts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_guidance.features.distributed import Ranks
from hf_guidance.features.reader import HIDDEN
from hf_guidance.features.rows import Batch, content_of, masks_of, mix
from hf_guidance.similarity.grams import flat, layer_gram
from hf_guidance.similarity.narrow import Thin, few
from hf_guidance.similarity.representation import Kernel, later
from hf_guidance.similarity.sketch import Sketch

INT64_MAX = torch.iinfo(torch.int64).max
Tokens = tuple[Tensor, Tensor, list[int]]  # rows, positions, and the number of tokens of each rank


class Samples:
    """Samples of one batch, over which the layers of a network become Gram matrices.

    Args:
        batch: inputs of the network. `attention_mask` `(batch, length)` tells the valid positions. Those of a decoder
            come from `decoder_attention_mask`, else from the labels that are not −100.
        axis: `sequence` or `token`. `sequence` makes each row one sample, with its positions flattened and counted from
            the first valid one. `token` makes each valid position a sample.
        max_tokens: largest number of tokens, all ranks together. They are chosen by a hash of row content, position and
            `seed`, so that row order and padding do not change the choice.
        seed: seed of that choice.
        like: samples of the other network, whose choice of tokens is used.
        ranks: processes whose batches are taken as one; None for this process alone.
        sketch: sketch of wide layers.
        thin: keep layers with few features as `Thin`, for a measure that is cheaper on them.
        together: leave small layers to `representation.complete`, which is cheaper for many at once.

    Attributes:
        count: number of rows, over all ranks.

    Raises:
        ValueError: the batch has no tensors, its valid positions differ from those of `like`, or the batches of the
            ranks differ in length without a mask.
    """

    def __init__(
        self,
        batch: Batch,
        axis: str = "sequence",
        max_tokens: int = 1024,
        seed: int = 0,
        like: Samples | None = None,
        ranks: Ranks | None = None,
        sketch: Sketch | None = None,
        thin: bool = False,
        together: bool = False,
    ) -> None:
        self.content = content_of(batch)
        self.batch_size = self.content.shape[0]
        self.axis, self.max_tokens, self.seed, self.like = axis, max_tokens, seed, like
        self.masks = masks_of({k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim >= 2})
        self.ranks, self.sketch, self.thin, self.together = ranks, sketch, thin, together
        self.counts, self.lengths = self._across_ranks()
        self.count = sum(self.counts)
        self.positions: dict[str, int | str] = {}  # mask or number of positions of a layer's tokens; equal in a pair
        self._orders: dict[str, Tensor | None] = {}
        self._chosen: dict[str | int, Tokens] = {}  # by kind of mask, or number of positions without one
        if like is not None and axis == "token":
            self._check_same_tokens(like)

    def gram(self, name: str, features: Tensor) -> Kernel:
        """Compute the Gram matrix `(n, n)` of a layer, its `Thin` features, or the `Later` that becomes one of them.

        Args:
            name: name of the layer.
            features: output of the layer, `(batch, …)`.

        Raises:
            ValueError: the first axis of the output is not the batch, or its length is not that of the mask.
        """
        if not isinstance(features, Tensor) or features.ndim < 2 or features.shape[0] != self.batch_size:
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"layer {name!r} gave {got}; expected a tensor with the batch's {self.batch_size} samples on its "
                "first axis. Guide and target see the same rows; choose another layer if this one is not batch-first."
            )
        if self.axis == "token" and features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)  # (batch, channels, h, w): a token is a place in the image
        given, precision, counts = features, features.dtype, self.counts
        kind = self._kind_of_mask(name, features)
        if kind is not None:
            features = self._aligned(features, kind)
        mask, length = None, None
        if self.axis == "token":
            self.positions[name] = features.shape[1] if kind is None else f"the {kind}'s"
            rows, positions, counts = self._tokens(name, features, kind)
            features = features[rows, positions]
        elif kind is not None:
            mask, length = self._valid(self.masks[kind]).to(features.device), self.lengths[kind]
        is_given = features is given
        if self.sketch and mask is None:
            unsketched = flat(features)
            features = self.sketch(name, unsketched)
            is_given = is_given and features is unsketched
        if self.ranks:
            features = self.ranks.gather(features, counts, length)
            mask = mask if mask is None else self.ranks.gather(mask, counts, length)
            is_given = False
        # hidden states are returned to the user, and not overwritten
        keep_copy = is_given and not HIDDEN.fullmatch(name)
        if mask is None:
            features = flat(features)
            thin = self.thin and few(features)
            # small layers on a CPU: a copy is cheap
            to_copy = keep_copy or (is_given and features.device.type == "cpu")
            if self.together and (kept := later(features, precision, to_copy, thin)):
                return kept
            if thin:
                return Thin.apply(precision, features)[0]
        sketch = partial(self.sketch, name) if self.sketch else None
        return layer_gram(features, mask, sketch=sketch, precision=precision, keep_copy=keep_copy, in_region=True)

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
            mask = self.masks[kind]
            is_aligned = bool((mask[:, :-1] >= mask[:, 1:]).all())
            self._orders[kind] = None if is_aligned else mask.int().argsort(dim=1, descending=True, stable=True)
        order = self._orders[kind]
        if order is None:
            return features
        return features.take_along_dim(
            order.to(features.device).reshape(order.shape + (1,) * (features.ndim - 2)), dim=1
        )

    @staticmethod
    def _valid(mask: Tensor) -> Tensor:
        """Return `(batch, length)`: true at as many first positions of each row as the mask has valid ones."""
        return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)

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
            rows, positions = self._choose(everywhere if kind is None else self._valid(self.masks[kind]))
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
        score = mix(self._row_hashes()[:, None] + mix(positions + 1)[None, :] + self.seed) & INT64_MAX
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

    def _row_hashes(self) -> Tensor:
        """Compute a hash of each row's content, `(batch,)`, that does not depend on padding."""
        content = self.content if not self.content.is_floating_point() else self.content.float().view(torch.int32)
        mask = self.masks.get("encoder")  # the mask of the content, whichever layer the tokens are chosen for
        if mask is not None and content.shape[:2] == mask.shape:
            valid = self._valid(mask).reshape(mask.shape + (1,) * (content.ndim - 2))
            content = torch.where(valid, self._aligned(content, "encoder"), -1)
        content = content.flatten(1).long()
        places = mix(torch.arange(content.shape[1], device=content.device) + 1)
        return torch.where(content == -1, 0, mix(content + places)).sum(1)


def _below_the_last(score: Tensor, smallest: Tensor) -> Tensor:
    """Select the scores below the last of the smallest ones; if there are none, those equal to it.

    Equal rows have equal scores. They are taken or left together, so that the choice does not depend on how rows are
    split over batches.
    """
    last = smallest[-1]
    return torch.where(smallest[0] < last, score < last, score <= last)
