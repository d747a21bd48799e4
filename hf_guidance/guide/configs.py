"""Configs of guides, from the Hub, a folder or timm. Those that timm exported are changed for transformers."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_guidance.config import Json
from hf_guidance.guide.source import PLACES, check_config, commit_of, in_timm, only, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def config_of(source: str | PreTrainedConfig, **kwargs: Any) -> Any:
    """Return the config of a guide, given as a config, `timm/<architecture>`, folder or Hub id.

    Args:
        source: One of these.
        **kwargs: Arguments for `from_pretrained`.

    Raises:
        OSError: If a Hub id has no config, or cannot be reached.
        ValueError: If a folder has no config, or the config would make libraries read pickles, or files from another
            repository.
    """
    from transformers import AutoConfig, PreTrainedConfig, TimmWrapperConfig

    if isinstance(source, PreTrainedConfig):
        check_config(source.to_dict())
        return _with_classes_once(copy.deepcopy(source))
    if str(source).startswith("timm/") and not os.path.isdir(source):
        architecture = str(source).removeprefix("timm/")
        if in_timm(architecture):
            return TimmWrapperConfig(architecture=architecture)
    read_config(source, **kwargs)
    if commit := commit_of(source, kwargs.get("revision")):
        kwargs["revision"] = commit  # read again the commit that was checked
    return _with_classes_once(AutoConfig.from_pretrained(source, **kwargs))


def config_if_timm_exported(source: str, written: Mapping[str, Json], **kwargs: Any) -> Any:
    """Return the config of a network that timm exported, changed for transformers; None for any other network.

    Args:
        source: Hub id or folder.
        written: Content of its `config.json`.
        **kwargs: Arguments for `from_pretrained`.
    """
    from transformers import AutoConfig

    model_args = written.get("model_args")
    if not isinstance(model_args, Mapping) or "num_classes" not in model_args:
        return None
    return _with_classes_once(AutoConfig.from_pretrained(source, **only(PLACES, kwargs), trust_remote_code=False))


def _with_classes_once(config: Any) -> Any:
    """Remove the number of classes from `model_args`. timm writes it twice, and transformers would pass it twice."""
    if config.model_type == "timm_wrapper" and config.model_args:
        config.model_args = {name: value for name, value in config.model_args.items() if name != "num_classes"}
    return config


def is_resnet(guide: str) -> bool:
    """Tell whether a guide is a ResNet, by its architecture."""
    if guide.startswith("timm/") and not os.path.isdir(guide):
        return "resnet" in guide
    from transformers import PreTrainedConfig

    try:
        config = PreTrainedConfig.get_config_dict(guide)[0]
    except Exception:  # of the files, the Hub or its client, which load_guide explains
        return False
    return "resnet" in str(config.get("architecture", config.get("model_type")))
