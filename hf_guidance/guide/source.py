"""Source of a guide: one repository or folder, of which only JSON and safetensors files are read."""

from __future__ import annotations

import inspect
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from hf_guidance.config import Json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ADAPTER = "adapter_config.json"
SAFE = (".safetensors", ".safetensors.index.json")
# arguments of `from_pretrained` that tell where files are
PLACES = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "proxies", "force_download")
ONE_AT_A_TIME = threading.RLock()
ONE_PLACE = "but all of a guide must come from one place"


def in_timm(name: Json) -> bool:
    """Tell whether timm has an architecture of that name."""
    import timm

    return bool(timm.is_model(str(name)))


def check_is_there(source: Any) -> None:
    """Raise ValueError if a source can only be a local folder, and there is no such folder."""
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(text, str) or os.path.isdir(text):
        return
    if isinstance(source, os.PathLike) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        own = " '~' is not expanded: write the path in full." if text.startswith("~") else ""
        raise ValueError(f"there is no such folder (seen from {os.getcwd()}).{own}")


def damaged_weights(source: str, error: BaseException) -> str | None:
    """Name the files of weights that cannot be read, and what to do about them; None for any other error."""
    if not isinstance(error, SafetensorError):
        return None
    folder = Path(source)
    if not folder.is_dir():
        config = try_to_load_from_cache(source, "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
    damaged = [path.name for path in sorted(folder.rglob("*.safetensors")) if not _is_readable(path)]
    return (
        f"{', '.join(damaged) or 'a file of its weights'} is damaged or incomplete ({error}). Save or fetch it again; "
        "in a clone of a repository run `git lfs pull`; from the Hub pass force_download=True."
    )


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def read_config(source: str, **kwargs: Any) -> dict[str, Any]:
    """Read the `config.json` of a source and check it, before anything is built from it.

    Args:
        source: Hub id or folder.
        **kwargs: Arguments for `from_pretrained`.

    Returns:
        Values of the config.

    Raises:
        OSError: If there is no config, or it cannot be reached.
        ValueError: If the source is an adapter, or its config asks for pickles or for files from elsewhere.
    """
    from transformers import PreTrainedConfig

    try:
        config: Any = PreTrainedConfig.get_config_dict(source, **only((*PLACES, "gguf_file"), kwargs))[0]
    except OSError:
        _check_no_adapter(source, **only(PLACES, kwargs))
        raise
    except TypeError:  # earlier versions set a key of whatever they have read
        config = None
    if not isinstance(config, dict):
        raise ValueError("its config.json is no JSON object.")
    check_config(config, kwargs, str(source))
    return config


def commit_of(
    source: str | PreTrainedConfig,
    revision: str | None = None,
    cache_dir: str | None = None,
    subfolder: str | None = None,
) -> str | None:
    """Return the Hub commit that a config was just read from; None if it is not from the Hub.

    The commit is read from the Hub's cache on this machine. Only some versions of transformers keep it in the config.

    Args:
        source: Hub id or folder.
        revision: Branch, tag or commit that was asked for.
        cache_dir: Folder of the cache; the default one if None.
        subfolder: Folder of the config in the repository.
    """
    if not isinstance(source, str) or os.path.isdir(source):
        return None
    name = f"{subfolder}/config.json" if subfolder else "config.json"
    config = try_to_load_from_cache(source, name, cache_dir=cache_dir, revision=revision)
    return Path(config.removesuffix(name)).name if isinstance(config, str) else None


def check_config(config: Mapping[str, Json], given: Mapping[str, Any] | None = None, source: str = "") -> None:
    """Raise ValueError for a config that would make libraries read pickles, or files from another repository.

    Args:
        config: Values of `config.json`; nested configs are checked too.
        given: Arguments of `from_pretrained`, which override the config.
        source: Hub id or folder of the config.
    """
    for name, value in ((str(name), value) for name, value in config.items()):  # names of labels may be numbers
        for nested in value if isinstance(value, list) else [value]:
            if isinstance(nested, Mapping):
                check_config(nested, given, source)
        if name == "transformers_weights" and value is not None and not str(value).endswith(SAFE):
            raise ValueError(f"its config names the weights {value!r}; only safetensors are read.")
        if name == "backbone" and isinstance(value, str) and not in_timm(value):
            raise ValueError(
                f"its config takes the backbone {value!r} from elsewhere, {ONE_PLACE}. Load the network yourself and "
                "pass the module."
            )
        if name == "auto_map" and (given or {}).get("trust_remote_code"):
            _check_code(value, source)
        if name.endswith("_implementation") and "/" in str(value) and name not in (given or {}):
            raise ValueError(
                f"its config takes {name} {value!r} from elsewhere, {ONE_PLACE}. Pass another, such as {name}='eager'."
            )
    if config.get("model_type") == "timm_wrapper" or "model_args" in config:
        _check_timm(config)


def _check_code(auto_map: Any, source: str) -> None:
    """Raise ValueError if code would be run from a repository other than the trusted one."""
    for places in auto_map.values() if isinstance(auto_map, Mapping) else ():
        for place in places if isinstance(places, list) else [places]:
            repository, separator, _ = str(place).partition("--")
            if separator and repository != source:
                raise ValueError(
                    f"its config takes code from {repository!r}, {ONE_PLACE}. Load the network yourself and pass the "
                    "module."
                )


def _check_timm(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless timm would build one of its own architectures, with arguments of the network alone."""
    import timm

    architecture = config.get("architecture")
    if architecture is not None and not in_timm(architecture):
        raise ValueError(
            f"its config names the architecture {architecture!r}, which is not in this version of timm, {ONE_PLACE}."
        )
    reserved = set(inspect.signature(timm.create_model).parameters) - {"kwargs"}
    if found := sorted(reserved & set(config.get("model_args") or {})):
        raise ValueError(
            f"its config gives timm the model_args {', '.join(found)}, which make it read other files; only arguments "
            "of the network itself are possible."
        )


def check_files(source: str, weights: str | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for an adapter, or for an index of weights that names anything but safetensors beside it.

    Args:
        source: Hub id or folder.
        weights: File of weights that the config names, or None.
        kwargs: Arguments for `from_pretrained`.
    """
    places, variant = only(PLACES, kwargs), f".{kwargs['variant']}" if kwargs.get("variant") else ""
    _check_no_adapter(source, **places)
    if weights is None and _cached(source, f"model{variant}.safetensors", **places):
        return  # this file is read before any index
    index = weights or f"model.safetensors.index{variant}.json"
    if not index.endswith(".json") or not (path := _cached(source, index, **places)):
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    shards = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shards, dict):
        raise ValueError(f"its {index} is not an index of weights: it has no weight_map.")
    for shard in sorted(set(map(str, shards.values()))):
        place = PurePosixPath(shard)
        if place.suffix != ".safetensors" or place.is_absolute() or ".." in place.parts or "\\" in shard:
            raise ValueError(f"its {index} names {shard!r}; weights must be safetensors beside it.")


def _check_no_adapter(source: str, subfolder: str | None = None, **places: Any) -> None:
    for where in {"", subfolder or ""}:
        if path := _cached(source, ADAPTER, subfolder=where, **places):
            base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise ValueError(
                f"it is an adapter of {base!r}, which would come from elsewhere, {ONE_PLACE}. Load it with PEFT, merge "
                "it (merge_and_unload), and pass the module."
            )


def _cached(source: str, name: str, **places: Any) -> Path | None:
    """Return the path of a source's file on this machine, downloaded if necessary; None if there is no such file."""
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(str(source), name, **quiet, **places)
    return None if path is None else Path(path)


def only(names: tuple[str, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Select the keyword arguments with one of these names."""
    return {name: kwargs[name] for name in names if name in kwargs}


@contextmanager
def without_pickles() -> Iterator[None]:
    """Refuse `torch.load` in this thread inside this context.

    The code of some networks reads a pickle in addition to their weights.
    """
    with ONE_AT_A_TIME, _refusing_pickles():  # otherwise threads would restore each other's torch.load
        yield


@contextmanager
def _refusing_pickles() -> Iterator[None]:
    load, thread = torch.load, threading.get_ident()

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise ValueError(f"it reads {Path(str(file)).name!r}, a pickle; only safetensors are read.")
        return load(file, *args, **kwargs)

    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = load
