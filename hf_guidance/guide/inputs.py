"""Inputs that are made (those of a decoder, noise, shuffled rows) or checked (own columns, vocabularies)."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hf_guidance.features.batch import Batch, is_packed, take_rows
from hf_guidance.features.reader import base_model_of
from hf_guidance.features.rows import check_is_batch, content_of, masks_of, tensors_of

GUIDE_PREFIX = "guide_"
GUIDE_PIXELS = "guide_pixel_values"
MAIN_INPUTS = ("input_ids", "pixel_values", "inputs_embeds")
BESIDE_INPUTS = {"attention_mask", "token_type_ids", "position_ids", "decoder_attention_mask"}
NO_LABEL = -100  # of positions without a label


def decoder_inputs(network: nn.Module, seen: Batch) -> dict[str, Any]:
    """Make the decoder inputs of an encoder-decoder from its labels, and their mask; empty if it does not do so.

    Args:
        network: The network.
        seen: Its columns of a batch.
    """
    labels: Any = seen.get("labels")
    mask: Any = seen.get("decoder_attention_mask")
    if (ids := _decoder_ids(network, labels)) is not None:
        made = {"decoder_attention_mask": (labels != NO_LABEL).long()}
        return {"decoder_input_ids": ids, **(made if mask is None and ids.shape == labels.shape else {})}
    takes_sound = "decoder_input_values" in inspect.signature(network.forward).parameters
    if isinstance(labels, Tensor) and labels.ndim == 3 and takes_sound:
        return _spectrogram_inputs(labels, mask, network)
    return {}


def _decoder_ids(network: Any, labels: Any) -> Tensor | None:
    """Shift the labels of a text to the right, as an encoder-decoder does; None if it does not do so."""
    if labels is None:
        return None
    shift: Any = getattr(network, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return shift(labels=labels)
    config: Any = getattr(network, "config", None)
    places = [config, config.get_text_config() if hasattr(config, "get_text_config") else None]
    found = ([getattr(place, f"{name}_token_id", None) for place in places] for name in ("decoder_start", "pad"))
    start, pad = (next((value for value in values if value is not None), None) for values in found)
    is_text = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
    if not (is_text and getattr(config, "is_encoder_decoder", False) and isinstance(start, int)):
        return None
    if "decoder_input_ids" not in inspect.signature(network.forward).parameters or not network.can_generate():
        return None  # a head on the encoder alone, or one whose labels are classes
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == NO_LABEL, 0 if pad is None else pad)


def _spectrogram_inputs(labels: Tensor, mask: Tensor | None, network: Any) -> dict[str, Tensor]:
    """Make the decoder inputs of a network that predicts frames of sound, as SpeechT5 does: one of several, shifted."""
    step = network.config.reduction_factor
    mask = labels.ne(NO_LABEL).any(-1).long() if mask is None else mask
    frames = labels[:, step - 1 :: step]
    shifted = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1)
    return {
        "decoder_input_values": shifted.masked_fill(shifted == NO_LABEL, 0.0),
        "decoder_attention_mask": mask[:, step - 1 :: step],
    }


def noise_like(batch: Batch, vocabulary: int | None, generator: torch.Generator) -> dict[str, Any]:
    """Replace the inputs of a batch by noise: random token ids, or noisy pixels in [0, 1]. Masks and labels stay.

    The guide's own images (`guide_pixel_values`) become the target's noise, resized by nearest neighbours.

    Args:
        batch: Columns of a batch.
        vocabulary: Number of token ids to draw from. None draws up to the largest id in the batch.
        generator: Source of the noise.

    Returns:
        The batch with noise.

    Raises:
        ValueError: If the batch has no such inputs, or has other inputs for the guide alone.

    Source: Subramaniam et al. 2025, released code (`randn + 0.1 randn`, clamped).
    """
    check_is_batch(batch)
    own = sorted(name for name in batch if name.startswith(GUIDE_PREFIX))
    if own and not (own == [GUIDE_PIXELS] and "pixel_values" in batch):
        raise ValueError(f"both networks cannot see the same noise: the batch has {own} for the guide alone.")
    if not any(name in batch for name in MAIN_INPUTS):
        raise ValueError(f"noise replaces one of {', '.join(MAIN_INPUTS)}; the batch has {sorted(batch)}.")
    noisy: dict[str, Any] = dict(batch)
    for name, value in list(noisy.items()):
        if name.removeprefix("decoder_") == "input_ids":
            high = vocabulary or int(value.max()) + 1
            noisy[name] = torch.randint(high, value.shape, generator=generator).to(value)
        elif name in ("pixel_values", "inputs_embeds"):
            noise = torch.randn(value.shape, generator=generator) + 0.1 * torch.randn(value.shape, generator=generator)
            noisy[name] = noise.clamp(0, 1).to(value)
    if own:  # nearest neighbours, because averaging would remove the noise
        theirs = noisy[GUIDE_PIXELS]
        noisy[GUIDE_PIXELS] = interpolate(noisy["pixel_values"], theirs.shape[-2:], mode="nearest").to(theirs)
    return noisy


def shuffle_rows(
    batch: Batch, generator: torch.Generator, lengths_of: Batch | None = None, most_staying: float = 1.0
) -> dict[str, Any]:
    """Replace each row of a batch by another row, at random; no row stays in its place.

    Args:
        batch: Columns with two or more rows.
        generator: Source of the order.
        lengths_of: Exchange only rows with equal numbers of valid positions in this batch. A row that no other is equal
            to stays.
        most_staying: Largest share of rows that may stay.

    Raises:
        ValueError: If more rows would stay.
    """
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    rows = torch.randperm(len(tensors[0]), generator=generator)
    groups, masks = [rows], [] if lengths_of is None else [*masks_of(tensors_of(lengths_of)).values()]
    if masks:
        numbers = torch.stack([mask.sum(1).cpu() for mask in masks], 1).unique(dim=0, return_inverse=True)[1]
        rows = rows[numbers[rows].argsort(stable=True)]
        groups = rows.split(numbers.bincount().tolist())
        if (staying := sum(len(group) == 1 for group in groups)) > most_staying * len(rows):
            raise ValueError(
                f"guide_input='shuffled' exchanges rows of equal length if positions are compared, but {staying} of "
                f"the batch's {len(rows)} rows have a length that no other has: use larger batches or rows of one "
                "length, group rows by length, or set sample_axis='sequence'."
            )
    source = torch.empty_like(rows)
    source[rows] = torch.cat([group.roll(1) for group in groups])
    return take_rows(batch, source)


def check_own_columns(batch: Batch) -> None:
    """Raise ValueError if the guide's own columns have no input of it, or other rows than the target's.

    Args:
        batch: Columns for both networks. The rows of packed documents are not counted.
    """
    own = {name: value for name, value in batch.items() if name.startswith(GUIDE_PREFIX)}
    if not own:
        return
    if not {name.removeprefix(GUIDE_PREFIX) for name in own} - BESIDE_INPUTS:
        raise ValueError(
            f"the batch has {', '.join(sorted(own))}, but no input for the guide alone, and a guide with columns of "
            "its own sees no others: add guide_input_ids, or leave them out to give it the target's columns."
        )
    theirs = {name: value for name, value in batch.items() if name not in own}
    rows = [len(content_of(columns)) for columns in (theirs, own)]
    alone = {name.removeprefix(GUIDE_PREFIX): value for name, value in own.items()}
    if rows[0] != rows[1] and not (is_packed(theirs) or is_packed(alone)):
        raise ValueError(
            f"the target's columns have {rows[0]} rows and the guide's ({', '.join(sorted(own))}) {rows[1]}: both "
            "networks need the same rows, in the same order. Give each example its guide_* columns."
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of token ids of a network; None if its config does not tell."""
    config: Any = getattr(base_model_of(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def check_vocabularies(target: nn.Module, guide: nn.Module, columns: Collection[str]) -> None:
    """Raise ValueError if the guide would get token ids of another vocabulary.

    Vocabularies are compared by size. A mismatch between vocabularies of equal size is not detected.

    Args:
        target: Network being trained.
        guide: Its guide.
        columns: Names of the batch's columns. Without `input_ids`, or with any `guide_*`, there is nothing to check.
    """
    sizes = vocabulary_size(target), vocabulary_size(guide)
    own = any(name.startswith(GUIDE_PREFIX) for name in columns)
    if None in sizes or sizes[0] == sizes[1] or own or "input_ids" not in columns:
        return
    raise ValueError(
        f"the target's vocabulary has {sizes[0]} tokens and the guide's {sizes[1]}: the same ids mean different words "
        "to them. Tokenise the text for the guide too, in the columns guide_input_ids and guide_attention_mask. Or, if "
        "one tokenizer serves both and only the embedding is padded, set guide_shares_tokenizer=True."
    )
