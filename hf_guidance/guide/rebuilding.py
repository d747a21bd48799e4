"""Rebuilding of the guide that guided a pushed target, from the target's repository."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from hf_guidance.config import CONFIG_NAME, GuidanceConfig
from hf_guidance.guide.hub_errors import hub_fault, one_line
from hf_guidance.guide.identity import fingerprint
from hf_guidance.guide.loading import load_guide
from hf_guidance.guide.own_base import HUB_ID
from hf_guidance.guide.size import size_of
from hf_guidance.guide.source import check_config, check_is_there
from hf_guidance.similarity.own import is_own

MAX_LABELS = 2**17  # each becomes a string in the config
MAX_NUMBER = 2**25  # in a field of a config that has no narrower bound
MAX_LAYERS = 1000
MAX_ENTRIES = 1000  # of a list
MAX_SIDE = 2**12  # pixels of an image's side, or positions of a window
MAX_PARAMETERS = 2**34  # more than any guide needs
# config fields that make libraries fetch or read more: GPU code, checkpoints, a pretrained backbone
FETCHING = re.compile(
    r"implementation|checkpoint|pretrained|quantization|auto_map|cache_(?:dir|implementation)|trust|url|file|hub"
)
# full names of config fields for the number of modules, and for the size of an image or a window
DEPTH = re.compile(r"(\w+_)?depths?|n_layers?|(num_|encoder_|decoder_)?(\w+_)?(layers|blocks|stages)")
SIDE = re.compile(r"(\w+_)?(image|img|crop|window|patch)_size|(\w+_)?resolution")
INDICES = re.compile(r"(moe|kv_source)_layers")
PLAIN = (None, False, True, "eager", "sdpa")
# free text, which does not affect the network
LABELS = re.compile(r"id2label|label2id|label_names|pretrained_cfg|task_specific_params|\w+_(?:token|sep)")
MAX_CONFIG_BYTES = 2**23
TYPES: dict[str, tuple[type, ...]] = {
    "source": (str, type(None)),
    "untrained": (bool, type(None)),
    "seed": (int, type(None)),
}
TYPES |= {"revision": (str, type(None)), "fingerprint": (str,), "config": (dict, type(None))}
TYPES |= {"own_base": (bool, type(None)), "architecture": (str, type(None))}


def load_guide_of(
    target: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> nn.Module:
    """Load the guide of a pushed or saved target. An untrained guide is rebuilt from its seed.

    Only numbers and names are read from the target's repository, and none of its code is run. A separate process first
    measures the size of an untrained guide, which takes some seconds.

    Args:
        target: Hub id or local folder of a target that a `GuidanceTrainer` saved.
        revision: Branch, tag or commit of the target's repository.
        token: Token for a private repository, of the target or of a trained guide.

    Returns:
        The frozen guide, with bit-identical weights.

    Raises:
        ValueError: If `target` names no place, the guidance config cannot be read or is invalid, or the guide cannot be
            rebuilt, because it was the user's own module or folder, or these library versions draw other weights. A
            guide that was the target's own base is rebuilt if that base is on the Hub.
    """
    if not isinstance(target, (str, os.PathLike)):
        raise ValueError(
            f"load_guide_of got a {type(target).__name__}; expected the Hub id or the folder of a target that a "
            "GuidanceTrainer saved. load_guide loads a guide by its own name."
        )
    folder = _fetch(target, revision, token)
    try:
        if (size := (folder / CONFIG_NAME).stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {MAX_CONFIG_BYTES:,}")
        config, guide = GuidanceConfig.load(folder)
        if own := [name for name in (config.measure, *config.log_measures) if is_own(name)]:
            raise ValueError(f"its measure {own[0]!r} is code of somebody's own, which is never imported from a config")
        _check(guide)
    except (OSError, TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the {CONFIG_NAME} of {target} is not one of this package's: {error}") from error
    rebuilt = _rebuild(guide, str(target), token)
    if (found := fingerprint(rebuilt)) != guide["fingerprint"]:
        raise ValueError(
            f"the guide of {target} is {guide['fingerprint'][:19]}…, but the rebuilt one is {found[:19]}…. It was made "
            f"with {guide.get('versions')}, whose random weights or files may differ, or it was loaded with options "
            "that are not stored (a dtype, a subfolder, a task head)."
        )
    return rebuilt


def _fetch(target: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    if os.path.isdir(target):
        if not (Path(target) / CONFIG_NAME).is_file():
            raise ValueError(f"{target} has no {CONFIG_NAME}: it is not a target that a GuidanceTrainer saved.")
        return Path(target)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        check_is_there(target)
        return Path(hf_hub_download(str(target), CONFIG_NAME, revision=revision, token=token)).parent
    except Exception as error:  # the client's own, the HTTP library's, or the disk's
        if fault := hub_fault(str(target), error):
            raise ValueError(f"Cannot read the {CONFIG_NAME} of {target}: {fault}") from error
        if isinstance(error, EntryNotFoundError):
            raise ValueError(
                f"{target} has no {CONFIG_NAME}: it is not a target that a GuidanceTrainer pushed."
            ) from error
        raise ValueError(f"{target} is neither a folder nor a target on the Hub: {one_line(error)}.") from error


def _check(guide: Any) -> None:
    if not isinstance(guide, dict) or not guide:
        raise ValueError("it names no guide")
    for name, possible in TYPES.items():
        if not isinstance(guide.get(name), possible) or (name == "seed" and isinstance(guide.get(name), bool)):
            raise ValueError(f"{name} is {str(guide.get(name))[:80]!r}")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", guide["fingerprint"]):
        raise ValueError(f"fingerprint is {guide['fingerprint'][:80]!r}")
    _check_numbers(guide["config"] or {})
    check_config(guide["config"] or {})
    if guide["seed"] is not None and not 0 <= guide["seed"] < 2**63:
        raise ValueError(f"seed is {guide['seed']}")


def _check_numbers(config: dict[str, Any], fetches: bool = False) -> None:
    """Raise ValueError for a config that could build something too large, or fetch something.

    Args:
        config: Values of the config; nested configs are checked too.
        fetches: Whether they belong to a field that fetches something.
    """
    for name, value in config.items():
        if LABELS.fullmatch(name):
            continue
        values, refused = _flat(value), f"{name} is {str(value)[:80]!r}"
        reads = fetches or (bool(FETCHING.search(name)) and not name.startswith("use_cache"))
        numbers = [abs(entry) for entry in values if isinstance(entry, int) and not name.endswith("theta")]
        deep = bool(DEPTH.fullmatch(name) and not INDICES.fullmatch(name)) and sum(numbers) > MAX_LAYERS
        if len(values) > MAX_ENTRIES or deep or any(number > _max_number(name) for number in numbers):
            raise ValueError(refused)
        for entry in values:
            if isinstance(entry, dict):
                _check_numbers(entry, reads)
            elif (isinstance(entry, str) and re.search(r"[/\\:]", entry)) or (reads and not _is_plain(name, entry)):
                raise ValueError(refused)


def _is_plain(name: str, entry: Any) -> bool:
    """Tell whether this value of a field cannot fetch anything, like a number."""
    if isinstance(entry, bool):
        return not (entry and "pretrained" in name)
    return entry in PLAIN or isinstance(entry, (int, float))


def _max_number(name: str) -> int:
    return MAX_SIDE if SIDE.fullmatch(name) else MAX_LABELS if name.endswith("labels") else MAX_NUMBER


def _flat(value: Any) -> list[Any]:
    """Return the entries of a list and of all lists in it."""
    return [entry for part in value for entry in _flat(part)] if isinstance(value, list) else [value]


def _check_size(config: dict[str, Any], stated: Any) -> None:
    """Raise ValueError if a network differs in size from what is stated, or does not fit into memory.

    The network takes no memory of this process.
    """
    size, free = size_of(config), psutil.virtual_memory().available
    if size.parameters > MAX_PARAMETERS or (isinstance(stated, int) and size.parameters != stated):
        raise ValueError(
            f"its config makes a network of {size.parameters:,} parameters, but it states {str(stated)[:30]}"
        )
    if (needed := size.weights + size.largest) > free:
        raise ValueError(
            f"building its {size.parameters:,} parameters and its buffers takes {needed / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free here"
        )


def _rebuild(guide: dict[str, Any], target: str, token: str | bool | None) -> nn.Module:
    from transformers import AutoConfig

    import hf_guidance.targets  # noqa: F401  registers our own architectures

    source = guide["source"] or ""
    if guide["untrained"] and guide["config"]:
        values = dict(guide["config"])
        kind = values.pop("model_type", "")
        try:
            _check_size(guide["config"], guide.get("parameters"))
            return load_guide(AutoConfig.for_model(kind, **values), seed=guide["seed"] or 0)
        except Exception as error:  # a network's own code may raise anything on such numbers
            raise ValueError(f"the guide of {target} cannot be built from its config: {error}") from error
    access: dict[str, Any] = {} if token is None else {"token": token}
    if guide["untrained"] is False and HUB_ID.fullmatch(source):
        return load_guide(source, revision=guide["revision"], **access)
    if guide.get("own_base"):
        if HUB_ID.fullmatch(source):
            access["auto_class"] = _class_of(guide, target)
            return load_guide(source, revision=guide["revision"], **access)
        where = f"a local folder or network called {source!r}" if source else "a network that was loaded from nowhere"
        raise ValueError(
            f"the guide of {target} was the target's own base, {where}, which is not stored with the target: load that "
            "base with load_guide; or, for the target itself, put the adapter on the base with "
            "peft.PeftModel.from_pretrained, and pass it to load_guide_of_base."
        )
    where = f"a local folder called {source!r}" if source else "a module of the user's own"
    raise ValueError(f"the guide of {target} was {where}, which is not stored with the target: ask its author for it.")


def _class_of(guide: dict[str, Any], target: str) -> Any:
    """Return the class of transformers, or of this package, that a target's own base has by its name."""
    import transformers

    import hf_guidance.targets

    name = guide.get("architecture") or ""
    found = getattr(transformers, name, None) or getattr(hf_guidance.targets, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"the guide of {target} was the target's own base, a {name[:80]!r}, which is no network of transformers or "
            f"of this package: load {guide['source']} with its own code, and pass it to load_guide."
        )
    return found
