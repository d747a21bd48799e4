"""One call of a guide, and in plain words why it fails."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guidance.features.batch import Batch
from hf_guidance.features.reader import AllRead, base_model_of
from hf_guidance.features.rows import valid_positions
from hf_guidance.guide.inputs import GUIDE_PREFIX, MAIN_INPUTS, accepted_columns, forward_arguments

# beginnings of the errors of transformers and timm
WRONG_SIZE = re.compile(r"input (image size|img_size|height|width)", re.IGNORECASE)


def forward(guide: nn.Module, inputs: Batch, role: str = "guide") -> Any:
    """Run a guide on those of the inputs that it accepts, moved to its device.

    Args:
        guide: The guide.
        inputs: Columns of a batch.
        role: What the network is, for the message.

    Returns:
        Output of the guide.

    Raises:
        ValueError: If the guide does not run on these inputs. The message has the guide's own error and what to do.
    """
    args, kwargs = forward_arguments(guide, inputs)
    if "use_cache" in accepted_columns(guide):  # with a cache, transformers takes packed documents for one document
        kwargs["use_cache"] = False
    mask = kwargs.get("attention_mask")
    if (
        isinstance(mask, Tensor)
        and mask.ndim == 2
        and mask.is_floating_point()
        and isinstance(base_model_of(guide), PreTrainedModel)
    ):
        kwargs["attention_mask"] = valid_positions(mask).long()  # transformers takes 0 for padding
    parameter = next(base_model_of(guide).parameters(), None)  # a target's own base holds none itself
    if parameter is not None and parameter.device.type != "meta":
        args = [value.to(parameter.device) for value in args]
        kwargs = {k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    try:
        return guide(*args, **kwargs)
    except (AllRead, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _is_from_here(error):
            raise
        main = next((name for name in MAIN_INPUTS if name in inputs), "")
        seen = {**dict.fromkeys([main] * len(args), args[0] if args else None), **kwargs}
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in seen.items() if isinstance(value, Tensor))
        shapes += f" as its {accepted_columns(guide)[0]}" if args else ""
        words = str(error).strip().splitlines()
        remedy = _remedy(guide, seen, str(error), GUIDE_PREFIX if role == "guide" else "")
        raise ValueError(
            f"the {role} ({type(guide).__name__}) does not run on {shapes}: {type(error).__name__}: "
            f"{words[0].rstrip('. ') if words else ''}. {remedy}"
        ) from error


def _is_from_here(error: BaseException) -> bool:
    """Tell whether an error was raised by what reads the layers, not by the guide."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("hf_guidance.features.")


def _remedy(guide: nn.Module, seen: Batch, error: str, prefix: str) -> str:
    """Tell what may help; columns of the network's own begin with the prefix."""
    base: Any = base_model_of(guide)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = seen.get("input_ids")
    longest = getattr(text, "max_position_embeddings", None)
    part = "vision_model" if "pixel_values" in seen else "text_model"
    if "decoder_input_ids" in accepted_columns(guide) and "decoder_input_ids" not in seen:
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
