"""Why a network does not run on a batch, in plain words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.features.batch import Batch
from hf_guidance.features.reader import base_model_of
from hf_guidance.guide.inputs import GUIDE_PREFIX, MAIN_INPUTS

# beginnings of the errors of transformers and timm
WRONG_SIZE = re.compile(r"input (image size|img_size|height|width)", re.IGNORECASE)


def why_it_fails(
    network: nn.Module, inputs: Batch, args: Sequence[Tensor], kwargs: Batch, error: Exception, role: str
) -> str:
    """Explain an error of a network's forward, and what to do about it.

    Args:
        network: The network.
        inputs: Columns of the batch.
        args, kwargs: Those of them that it was called with.
        error: Its own error.
        role: What it is, for the message: `guide`, whose columns have a prefix, or another word.
    """
    main = next((name for name in MAIN_INPUTS if name in inputs), "")
    seen = {**dict.fromkeys([main] * len(args), args[0] if args else None), **kwargs}
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in seen.items() if isinstance(value, Tensor))
    takes = list(inspect.signature(base_model_of(network).forward).parameters)
    shapes += f" as its {takes[0]}" if args else ""
    words = str(error).strip().splitlines()
    remedy = _remedy(network, seen, takes, str(error), GUIDE_PREFIX if role == "guide" else "")
    return (
        f"the {role} ({type(network).__name__}) does not run on {shapes}: {type(error).__name__}: "
        f"{words[0].rstrip('. ') if words else ''}. {remedy}"
    )


def is_from_here(error: BaseException) -> bool:
    """Tell whether an error was raised by what reads the layers, not by the guide."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("hf_guidance.features.")


def _remedy(network: nn.Module, seen: Batch, takes: Sequence[str], error: str, prefix: str) -> str:
    """Tell what may help; columns of the network's own begin with the prefix."""
    base: Any = base_model_of(network)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = seen.get("input_ids")
    longest = getattr(text, "max_position_embeddings", None)
    part = "vision_model" if "pixel_values" in seen else "text_model"
    if "decoder_input_ids" in takes and "decoder_input_ids" not in seen:
        beside = f" (beside {prefix}input_ids)" if prefix else ""
        return (
            f"It is an encoder-decoder, and the batch has nothing for its decoder: add {prefix}decoder_input_ids"
            f"{beside}, or pass its encoder, by get_encoder()."
        )
    if WRONG_SIZE.match(error) and "pixel_values" in seen:
        return f"Give it images of its own size in the column {prefix}pixel_values, or build it for this size."
    if isinstance(ids, Tensor) and isinstance(longest, int) and ids.shape[1] > longest:
        return f"It has {longest} positions: give it shorter rows in {prefix}input_ids, or take another."
    weights = next((p.dtype for p in base.parameters() if p.is_floating_point()), None)
    given = next((v.dtype for v in seen.values() if isinstance(v, Tensor) and v.is_floating_point()), weights)
    if given != weights and not torch.is_autocast_enabled():
        return f"Its weights are {weights} and its inputs {given}: give both one type, as by .float()."
    if isinstance(getattr(base, part, None), nn.Module):
        return f"If that is all it should see, pass guide.{part}."
    return "If it needs other inputs, add them in columns" + (f" that begin with {prefix!r}." if prefix else ".")
