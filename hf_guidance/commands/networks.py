"""Networks named on the command line, and an example of what they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.guide.configs import config_of
from hf_guidance.guide.forward import accepted_columns
from hf_guidance.guide.inputs import vocabulary_size
from hf_guidance.guide.loading import POSSIBLE, AutoClass, load_guide, untrained_network
from hf_guidance.tasks.image_decoding import PixelFormat
from hf_guidance.tasks.pixel_formats import pixel_format_of

NETWORKS = "A network is a local folder with a config.json, a Hub id, or timm/<architecture>."
SIDE = 64  # pixels of an image for a network that takes any size
LENGTH = 8  # tokens of an example


def load(name: str, seed: int | None) -> nn.Module:
    """Load a network, with random weights from a seed if one is given."""
    try:
        return load_guide(name, untrained=seed is not None, seed=seed or 0)
    except ValueError as error:
        said = str(error).replace("Cannot load guide", "Cannot load").replace(POSSIBLE, NETWORKS)
        raise ValueError(said) from error


def kind_of(network: nn.Module, name: str) -> str:
    """Tell whether a network takes `images` or `text`.

    Raises:
        ValueError: If it takes neither.
    """
    columns = accepted_columns(network)
    for column, kind in (("pixel_values", "images"), ("input_ids", "text")):
        if column in columns:
            return kind
    raise ValueError(f"{name} takes {', '.join(columns)}; expected pixel_values or input_ids, of images or text.")


def check_same_kind(names: Sequence[str], kinds: Sequence[str]) -> None:
    """Raise ValueError if two networks do not take data of the same kind."""
    if kinds[0] != kinds[1]:
        raise ValueError(f"{names[0]} takes {kinds[0]} and {names[1]} {kinds[1]}: two networks need the same data.")


def check_colours(network: nn.Module, name: str) -> None:
    """Raise ValueError if a network takes images of other than three channels."""
    if (channels := getattr(getattr(network, "config", None), "num_channels", 3)) != 3:
        raise ValueError(f"{name} takes images of {channels} channels, and the command makes those of 3.")


def head_for(name: str) -> AutoClass:
    """Return the Auto class that gives a network the head of its task, by which its loss is computed.

    Raises:
        ValueError: If there is none for texts or images.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    config = config_of(name, trust_remote_code=False)
    possible: list[Any] = [AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForCausalLM]
    if getattr(config, "is_encoder_decoder", False):
        possible = [AutoModelForSeq2SeqLM]
    found = next((auto for auto in possible if type(config) in auto._model_mapping), None)
    if found is None:
        raise ValueError(
            f"{name} ({config.model_type}) has no head for language modelling or the classification of images, so that "
            "there is no task loss: inspect it in Python, by hf_guidance.experiments.inspect."
        )
    return found


def load_target(name: str, seed: int | None, head: AutoClass, classes: int = 0) -> nn.Module:
    """Load a network to be trained, with the head of its task.

    Args:
        name: Hub id, folder or `timm/<architecture>`.
        seed: Seed of random weights; None loads its own.
        head: Result of `head_for`.
        classes: Number of classes of images.
    """
    changes: dict[str, Any] = {"num_labels": classes} if classes else {}
    if seed is None:
        changes |= {"ignore_mismatched_sizes": True} if classes else {}
        return load_guide(name, auto_class=head, **changes).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = untrained_network(name, head, **changes)
        return network


def pixels_of(name: str, seed: int | None, size: int | None) -> PixelFormat:
    """Return the size and normalisation of the images of a network."""
    try:
        return pixel_format_of(name, size or SIDE, trained=seed is None, given=size)
    except ValueError as error:
        if "without an image processor" not in str(error):
            raise
        raise ValueError(
            f"{name} comes without an image processor, so that the size and normalisation of its images are unknown: "
            "save the processor beside its weights, or take random weights (the flags --untrained_…)."
        ) from error


def example_for(network: nn.Module, name: str, size: int | None = None) -> dict[str, Tensor]:
    """Make two rows of random input that a network takes.

    Raises:
        ValueError: If it takes neither images nor text.
    """
    random = torch.Generator().manual_seed(0)
    if kind_of(network, name) == "images":
        side = pixel_format_of(name, SIDE, trained=False, given=size).size
        config: Any = getattr(network, "config", None)
        channels = getattr(config, "num_channels", 3) or 3
        return {"pixel_values": torch.rand(2, channels, side, side, generator=random)}
    ids = torch.randint(vocabulary_size(network) or 2, (2, LENGTH), generator=random)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in accepted_columns(network):
        example["decoder_input_ids"] = ids
    return example
