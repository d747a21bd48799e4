"""What one sample of a layer is: a batch row or a token. Padding never counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_guidance.kernels import gram

INT64_MAX = torch.iinfo(torch.int64).max


class Samples:
    """Turns the layers of one network on one batch into Gram matrices over the same samples.

    Args:
        batch: the network's inputs. ``attention_mask`` ``(batch, length)`` says which positions are valid; a decoder's
            come from ``decoder_attention_mask``, else from the labels that are not −100.
        axis: ``sequence``: one sample per row, its positions flattened and counted from the first valid one;
            ``token``: every valid position is a sample.
        max_tokens: with ``token``, at most so many, chosen by a hash of row content, position and `seed`, so that
            neither the order of the rows nor the padding changes the choice.
        like: the other network's `Samples`, whose choice of tokens is taken over.

    Raises:
        ValueError: a batch without tensors, or valid positions that differ from those of `like`.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        axis: str = "sequence",
        max_tokens: int = 1024,
        seed: int = 0,
        like: Samples | None = None,
    ) -> None:
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim >= 2}
        if not tensors:
            raise ValueError(f"the batch has no tensor with a sample axis and another one; it has {sorted(batch)}.")
        known = [tensors[name] for name in ("input_ids", "pixel_values", "inputs_embeds") if name in tensors]
        self.content = (known or list(tensors.values()))[0]
        self.batch_size = self.content.shape[0]
        self.axis, self.max_tokens, self.seed, self.like = axis, max_tokens, seed, like
        self.masks = _masks(tensors)
        self.positions: dict[str, int | str] = {}  # whose, or how many, a layer's tokens are: the same for a pair
        self._orders: dict[str, Tensor | None] = {}
        self._chosen: dict[str | int, tuple[Tensor, Tensor]] = {}  # by kind of mask, else by number of positions
        if like is not None and axis == "token":
            self._check_same_tokens(like)

    def gram(self, name: str, features: Tensor) -> Tensor:
        """Gram matrix ``(n, n)`` of a layer's output ``(batch, …)``; see `similarity.gram`.

        Raises:
            ValueError: an output whose first axis is not the batch, or whose length is not that of the mask.
        """
        if not isinstance(features, Tensor) or features.ndim < 2 or features.shape[0] != self.batch_size:
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"layer {name!r} gave {got}; expected a tensor with the batch's {self.batch_size} samples on its "
                "first axis. Guide and target see the same rows; choose another layer if this one is not batch-first."
            )
        if self.axis == "token" and features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)  # (batch, channels, h, w): a token is a place in the image
        kind = self._kind_of_mask(name, features)
        if kind is not None:
            features = self._aligned(features, kind)
        if self.axis == "token":
            self.positions[name] = features.shape[1] if kind is None else f"the {kind}'s"
            return gram(features[self._tokens(name, features, kind)])
        return gram(features, None if kind is None else self._valid(self.masks[kind]).to(features.device))

    # ---------------------------------------------------------------------------------------------------- padding

    def _kind_of_mask(self, name: str, features: Tensor) -> str | None:
        """Which mask speaks of this layer's positions; None where there are none."""
        if not self.masks or features.ndim < 3:
            return None
        fitting = [kind for kind, mask in self.masks.items() if mask.shape[1] == features.shape[1]]
        if not fitting:
            lengths = ", ".join(f"{kind} {mask.shape[1]}" for kind, mask in self.masks.items())
            raise ValueError(
                f"layer {name!r} has {features.shape[1]} positions and the mask another number ({lengths}): which of "
                "them are padding is not known. Choose a layer with one position per token."
            )
        is_encoder = {"encoder", "encoder_hidden_states"} & set(name.split("."))
        side = "encoder" if is_encoder else "decoder"
        return side if side in fitting else fitting[0]

    def _aligned(self, features: Tensor, kind: str) -> Tensor:
        """Move each row's valid positions to its front, keeping their order."""
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
        """``(batch, length)``: true for the first positions of each row, as many as the mask lets through."""
        return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)

    # ----------------------------------------------------------------------------------------------------- tokens

    def _check_same_tokens(self, like: Samples) -> None:
        for kind in self.masks.keys() & like.masks.keys():
            mine, theirs = self.masks[kind], like.masks[kind]
            if mine is not theirs and not torch.equal(mine.sum(1), theirs.sum(1)):
                raise ValueError(
                    f"sample_axis='token': the guide has {int(mine.sum())} valid tokens and the target "
                    f"{int(theirs.sum())}, or other numbers in some rows. Use sample_axis='sequence' where the two "
                    "networks' tokens are not the same, or guide_input='shuffled' pairs rows of other lengths."
                )

    def _tokens(self, name: str, features: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
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
            self._chosen[key] = self._choose(everywhere if kind is None else self._valid(self.masks[kind]))
        rows, positions = self._chosen[key]
        return rows.to(features.device), positions.to(features.device)

    def _choose(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, positions) of the tokens that are compared."""
        if int(valid.sum()) <= self.max_tokens:
            rows, positions = valid.nonzero(as_tuple=True)
            return rows, positions
        positions = torch.arange(valid.shape[1], device=valid.device)
        score = _mix(self._row_hashes()[:, None] + _mix(positions + 1)[None, :] + self.seed) & INT64_MAX
        chosen = torch.where(valid, score, INT64_MAX).flatten().topk(self.max_tokens, largest=False).indices
        return chosen // valid.shape[1], chosen % valid.shape[1]

    def _row_hashes(self) -> Tensor:
        """``(batch,)``: a hash of what each row holds, blind to its padding."""
        content = self.content if not self.content.is_floating_point() else self.content.float().view(torch.int32)
        mask = self.masks.get("encoder")  # that of the content, whichever layer the tokens are chosen for
        if mask is not None and content.shape[:2] == mask.shape:
            valid = self._valid(mask).reshape(mask.shape + (1,) * (content.ndim - 2))
            content = torch.where(valid, self._aligned(content, "encoder"), -1)
        content = content.flatten(1).long()
        places = _mix(torch.arange(content.shape[1], device=content.device) + 1)
        return torch.where(content == -1, 0, _mix(content + places)).sum(1)


def _masks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = {}
    labels = tensors.get("labels")
    if (mask := tensors.get("decoder_attention_mask")) is not None:
        masks["decoder"] = mask.bool()
    elif (ids := tensors.get("decoder_input_ids")) is not None:
        masks["decoder"] = torch.ones_like(ids, dtype=torch.bool) if labels is None else labels != -100
    if (mask := tensors.get("attention_mask")) is not None and mask.ndim == 2:
        masks["encoder"] = mask.bool()
    return masks


def _mix(value: Tensor) -> Tensor:
    """Scatter int64 values over all 64 bits (products wrap around)."""
    for factor in (-7046029254386353131, -4658895280553007687):
        value = (value ^ (value >> 29)) * factor
    return value ^ (value >> 32)
