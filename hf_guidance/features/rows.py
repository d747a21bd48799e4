"""Rows of a batch: their content and its hashes, their valid positions, and the features of those to compare."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from hf_guidance.features.batch import Batch, documents_of, unpacked
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.masks import of_floats

CONTENT = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")
KINDS = ("encoder", "decoder", "frames")  # of masks
INT64_MAX = torch.iinfo(torch.int64).max
MOST_HASHED = 256  # of an image at least so many numbers are hashed, at even distances
OF_IMAGES = re.compile(r"(^|[._])(vision|visual|image)([._]|$)")  # in names of modules
ToFrames: TypeAlias = Callable[[Tensor], "Tensor | None"]  # lengths of inputs → lengths of layers

logger = logging.getLogger(__name__)


def content_of(batch: Batch) -> Tensor:
    """Return the content of a batch's rows: token ids, pixels, sound, embeddings, or else its first tensor of two axes.

    If no tensor has two axes, it is the first one with one axis, as of ids or of a scalar to regress on.

    Args:
        batch: Inputs of a network.

    Returns:
        `(batch, …)`.

    Raises:
        ValueError: If the batch has no tensor with a sample axis.
    """
    tensors = tensors_of(batch) or tensors_of(batch, axes=1)
    if not tensors:
        raise ValueError(
            f"the batch has no tensor with a sample axis; it has {sorted(batch)}. Guidance compares rows: let the data "
            "collator return the inputs as tensors (batch, …)."
        )
    known = [tensors[name] for name in CONTENT if name in tensors]
    return (known or list(tensors.values()))[0]


def check_is_batch(batch: object) -> None:
    """Raise ValueError unless a batch maps the names of columns to their values."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the batch is a {type(batch).__name__}; expected a mapping of the network's arguments, such as input_ids, "
            "to tensors (batch, …): let the data collator return a dict."
        )


def tensors_of(batch: Batch, axes: int = 2) -> dict[str, Tensor]:
    """Return the columns with at least so many axes, of which the first is that of the samples."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim >= axes}


def side_of(name: str) -> str:
    """Return which side of an encoder-decoder a layer's name tells: `encoder` or, for any other, `decoder`."""
    return "encoder" if {"encoder", "encoder_hidden_states"} & set(name.split(".")) else "decoder"


@cache
def _say_mask_of_pairs(name: str, axes: int) -> None:
    logger.warning(
        "%s has %d axes, from which padding cannot be told: all positions count. Pass a mask (batch, length) if there "
        "is padding.",
        name,
        axes,
    )


def masks_of(tensors: Mapping[str, Tensor], to_frames: ToFrames | None = None) -> dict[str, Tensor]:
    """Return the valid positions of encoder and decoder, if the batch has them.

    Args:
        tensors: Columns of the batch.
        to_frames: Lengths of sounds → numbers of frames, into which a network joins their samples.

    Returns:
        `encoder`, `decoder` and, of sounds, `frames` → `(batch, length)` of bool.

    Raises:
        ValueError: If a mask holds numbers that are neither 0 and 1 nor 0 and −inf.
    """
    masks: dict[str, Tensor] = {}
    labels = tensors.get("labels")
    if (mask := tensors.get("decoder_attention_mask")) is not None:
        masks["decoder"] = valid_positions(mask, "decoder_attention_mask")
    elif (ids := tensors.get("decoder_input_ids", tensors.get("decoder_inputs_embeds"))) is not None:
        masks["decoder"] = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
        if labels is not None and labels.shape == ids.shape[:2]:
            masks["decoder"] = labels.ne(-100)
    if (mask := tensors.get("attention_mask")) is not None and mask.ndim == 2:
        masks["encoder"] = valid_positions(mask, "attention_mask")
        if to_frames is not None and "input_ids" not in tensors:
            valid = masks["encoder"].sum(1)
            frames = to_frames(torch.cat([valid, valid.new_tensor([mask.shape[1]])]))
            if frames is not None:
                masks["frames"] = torch.arange(int(frames[-1]), device=mask.device) < frames[:-1, None]
    return masks


def valid_positions(mask: Tensor, name: str = "attention_mask") -> Tensor:
    """Read a mask of 0 and 1, or of what is added to attention scores: 0 where they count, −inf at padding.

    Args:
        mask: The mask, `(batch, length)`.
        name: Its name, for the message.

    Returns:
        `(batch, length)` of bool.

    Raises:
        ValueError: If it holds numbers that are neither.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return torch.where((mask < 0).any(), mask == 0, mask != 0)  # without waiting for a device
    return of_floats(mask, name)


def first_valid(mask: Tensor) -> Tensor:
    """Return `(batch, length)`: true at as many first positions of each row as the mask has valid ones."""
    return torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)


def in_front(mask: Tensor) -> Tensor | None:
    """Return the order that moves each row's valid positions to its front; None if they are there."""
    if (mask[:, :-1] >= mask[:, 1:]).all():
        return None
    return mask.int().argsort(dim=1, descending=True, stable=True)


def over(mask: Tensor, features: Tensor) -> Tensor:
    """Append axes to `(batch, length)` so that it spreads over features `(batch, length, …)`."""
    return mask.reshape(mask.shape + (1,) * (features.ndim - 2))


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


class ComparedRows:
    """Rows of a batch that are compared, and a layer's features of them, with the valid positions in front.

    Args:
        batch: Inputs of the network. `attention_mask` `(batch, length)` tells the valid positions. Those of a decoder
            come from `decoder_attention_mask`, else from the labels that are not −100. A document of a packed row is a
            row.
        axis: As of `Samples`.
        rows: Indices of the rows that are compared; None for all.
        skip_first: Number of valid positions at the beginning of each row that are left out.
        least: For `within`, fewest positions of a row that is compared.
        sides: For `within`, whose positions are compared: `encoder`, `decoder` or both.
        like: For `within`, rows of the other network, which tell which rows have enough positions.
        conventions: Those of the network; None if it has no maps and no frames.

    Attributes:
        rows_in_batch: Number of rows that the network sees.
        content: Content of the compared rows.
        masks: Their valid positions, as of `masks_of`.
        positions: Layer → number of its positions or whose mask they have; equal in a pair.
        has_skipped: Whether a layer had first positions to leave out.

    Raises:
        ValueError: If a mask is no tensor, has other rows than the batch, or holds other numbers than a mask does.
    """

    def __init__(
        self,
        batch: Batch,
        axis: str,
        rows: Tensor | None,
        skip_first: int,
        least: int,
        sides: Collection[str],
        like: ComparedRows | None,
        conventions: Conventions | None,
    ) -> None:
        self.axis, self.rows, self.skip_first, self.least = axis, rows, skip_first, least
        for name in ("attention_mask", "decoder_attention_mask"):
            if isinstance(mask := batch.get(name), Tensor) and mask.ndim != 2:
                _say_mask_of_pairs(name, mask.ndim)
            if isinstance(mask, Sequence):
                raise ValueError(
                    f"{name} is a {type(mask).__name__}, from which no padding can be told; expected a tensor (batch, "
                    "length): let the data collator return one."
                )
        self.conventions, to_frames = conventions, conventions.to_frames if conventions else None
        self.content, self.documents = content_of(batch), documents_of(batch) if "position_ids" in batch else []
        self.masks = masks_of(tensors_of(batch), to_frames)
        self.rows_in_batch = len(self.content)
        if other := {kind: len(mask) for kind, mask in self.masks.items() if len(mask) != self.rows_in_batch}:
            raise ValueError(
                f"the batch has {self.rows_in_batch} rows, but its masks have others ({other}): give each row its mask."
            )
        if self.documents:
            lengths = torch.tensor([place.stop - place.start for place in self.documents])
            self._length_of_row = tensors_of(batch)["position_ids"].shape[1]
            self.content = unpacked(self.documents, self.content)
            self.masks = {"encoder": (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.content.device)}
        elif rows is not None:
            self._take(rows)
        self.kept: Tensor | None = None if like is None else like.kept
        if like is None and axis == "within" and self.masks:
            self.kept = self._with_positions(sides)
        if self.kept is not None:
            self._take(self.kept)
        self.positions: dict[str, int | str] = {}
        self.has_skipped = False
        self._orders: dict[str, Tensor | None] = {}

    def prepared(self, name: str, features: Tensor) -> tuple[Tensor, str | None]:
        """Return the compared rows of a layer's output, their valid positions in front, and the kind of their mask.

        Args:
            name: Name of the layer.
            features: Output of the layer, `(batch, …)`.

        Raises:
            ValueError: If the first axis of the output is not the batch, it has too few positions, or none at all, or
                the layout of a map is not certain.
        """
        if not isinstance(features, Tensor) or features.ndim < 2 or features.shape[0] != self.rows_in_batch:
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"layer {name!r} gave {got}; expected a tensor with the batch's {self.rows_in_batch} samples on its "
                "first axis. Guide and target see the same rows; choose another layer if this one is not batch-first."
            )
        if not features.is_floating_point() or features.layout != torch.strided:
            raise ValueError(
                f"layer {name!r} gave {features.dtype}, {features.layout}; expected dense floating-point features. "
                "Choose another layer."
            )
        if self.documents:
            if features.ndim < 3 or features.shape[1] != self._length_of_row:
                raise ValueError(
                    f"layer {name!r} gave shape {tuple(features.shape)}, but the batch is one row of "
                    f"{len(self.documents)} documents: choose a layer with one position per token, or pad the rows."
                )
            features = unpacked(self.documents, features)
        for rows in (self.rows, self.kept):
            if rows is not None:
                features = features[rows.to(features.device)]
        if self.conventions is not None and features.ndim == 3 and name in self.conventions.over_sequence:
            features = features.transpose(1, 2)
        by_position = self.axis != "sequence"
        is_map = by_position and features.ndim == 4 and self.conventions is not None
        if is_map and self.conventions is not None:
            features = self.conventions.places(name, features)
        if by_position and features.ndim != 3:
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
        if self.axis == "within" and kind is None and features.shape[1] < self.least:
            raise ValueError(
                f"layer {name!r} has {features.shape[1]} positions in a row, and the measure needs {self.least}: use "
                "another layer or sample_axis='sequence'."
            )
        return features, kind

    def valid(self, kind: str) -> Tensor:
        """Return which positions count, `(batch, length)`, once valid ones are in front and the first are left out."""
        return first_valid(self.masks[kind])[:, self.skip_first :]

    def _kind_of_mask(self, name: str, features: Tensor) -> str | None:
        """Return which mask describes the positions of a layer; None if there is none of this length."""
        if not self.masks or features.ndim < 3 or OF_IMAGES.search(name):
            return None
        if self.conventions is not None and name in self.conventions.queries:
            return None
        side = side_of(name)
        others = ["encoder", "frames"] if side == "encoder" else ["decoder", "encoder", "frames"]
        fitting = [kind for kind in others if kind in self.masks and self.masks[kind].shape[1] == features.shape[1]]
        said = self.conventions is not None and self.conventions.has_said_padding_counts
        if not (fitting or said or all(bool(mask.all()) for mask in self.masks.values())):
            self._say_padding_counts(name, features.shape[1])
        return fitting[0] if fitting else None

    def _say_padding_counts(self, name: str, positions: int) -> None:
        lengths = ", ".join(f"{kind} {mask.shape[1]}" for kind, mask in self.masks.items())
        logger.warning(
            "Layer %r has %d positions, but the mask has another number (%s), so that it does not tell which of them "
            "are padding: all count, in this and other such layers. Choose layers with one position per token if that "
            "is not meant.",
            name,
            positions,
            lengths,
        )
        if self.conventions is not None:
            self.conventions.has_said_padding_counts = True

    def _take(self, rows: Tensor) -> None:
        self.content = self.content[rows.to(self.content.device)]
        self.masks = {kind: mask[rows.to(mask.device)] for kind, mask in self.masks.items()}

    def _with_positions(self, sides: Collection[str]) -> Tensor | None:
        """Return the rows with enough valid positions on the compared sides; None for all."""
        masks = [mask for kind, mask in self.masks.items() if kind in sides] or list(self.masks.values())
        numbers = torch.stack([mask.sum(1) for mask in masks]).amin(0) - self.skip_first
        kept = (numbers >= self.least).nonzero().flatten()
        return None if len(kept) == len(numbers) else kept

    def _aligned(self, features: Tensor, kind: str) -> Tensor:
        """Move each row's valid positions to its front, in their order."""
        if kind not in self._orders:
            self._orders[kind] = in_front(self.masks[kind])
        order = self._orders[kind]
        return features if order is None else features.take_along_dim(over(order.to(features.device), features), dim=1)

    def _without_first(self, name: str, features: Tensor) -> Tensor:
        if features.shape[1] <= self.skip_first:
            raise ValueError(
                f"skip_first_positions is {self.skip_first}, but layer {name!r} has {features.shape[1]} positions: "
                "lower it, so that some are left."
            )
        self.has_skipped = True
        return features[:, self.skip_first :]
