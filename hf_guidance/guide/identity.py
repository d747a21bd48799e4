"""Identity of a guide, in checkpoints, on resume and in model cards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import nn

from hf_guidance.config import Json
from hf_guidance.guide.own_base import OwnBase
from hf_guidance.guide.sharding import is_sharded, whole_state

IDENTITY = "guidance_identity"  # attribute of a loaded guide that holds its origin


def fingerprint(model: nn.Module) -> str:
    """Compute `sha256:…` of the names, dtypes, shapes and bytes of all parameters and saved buffers.

    That of a target's own base is the one that the base has without adapters. Training does not change it.
    """
    state = model.weights() if isinstance(model, OwnBase) else model.state_dict()
    if any(value.device.type == "meta" for value in state.values()):  # a device map keeps some weights elsewhere
        state = get_state_dict_offloaded_model(model)
    elif is_sharded(model):
        state = whole_state(model)
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def identity(guide: nn.Module) -> dict[str, Any]:
    """Return JSON values that identify a guide.

    They are its origin, architecture, number of parameters, library versions and the fingerprint of its weights. An
    untrained guide's config is included, and `own_base` if the guide is the target's own base.
    """
    import transformers

    origin = getattr(guide, IDENTITY, {"source": None, "untrained": None, "seed": None, "revision": None})
    network, parameters = guide, set(guide.parameters())
    if isinstance(guide, OwnBase):
        origin, network, parameters = guide.origin(), guide.get_base_model(), set(guide.shared().values())
    return origin | {
        "architecture": type(network).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "fingerprint": fingerprint(guide),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "config": _config(guide) if origin["untrained"] else None,
    }


def _config(guide: nn.Module) -> dict[str, Any] | None:
    """Return the config to rebuild an untrained guide from; None for a network without a transformers config."""
    config: Any = getattr(guide, "config", None)
    return json.loads(config.to_json_string(use_diff=True)) if hasattr(config, "to_json_string") else None


def check_same_guide(now: Mapping[str, Json], then: Mapping[str, Json], where: str) -> None:
    """Raise ValueError if a run would resume with a guide other than the one it started with.

    Args:
        now: Identity of the present guide.
        then: Identity of the guide that the run started with.
        where: Name of the checkpoint, for the message.
    """
    if then.get("fingerprint") not in (None, now["fingerprint"]):
        raise ValueError(
            f"{where} was guided by {_in_words(then)}, but this trainer's guide is {_in_words(now)}. Resuming would "
            "train towards another network: pass the same guide (same seed and library versions, or the weights kept "
            "by save_guide=True), or start anew without resume_from_checkpoint."
        )


def _in_words(guide: Mapping[str, Json]) -> str:
    kind = f"untrained, seed {guide.get('seed')}" if guide.get("untrained") else "with given weights"
    kind = "the target's own base" if guide.get("own_base") else kind
    weights = str(guide["fingerprint"])
    return f"{guide.get('architecture')} ({guide.get('source') or 'live module'}, {kind}, {weights[:19]}…)"
