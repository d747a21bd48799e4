"""The config of a guide: from the Hub, a folder, or timm, whose own exports need a change."""

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
    """The config of a config, a name of timm's, a folder or a Hub id.

    Raises:
        ValueError: a config by which pickles would be read, or files of another repository.
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
        kwargs["revision"] = commit  # so that what is read again is what has been checked
    return _with_classes_once(AutoConfig.from_pretrained(source, **kwargs))


def config_if_timm_exported(source: str, written: Mapping[str, Json], **kwargs: Any) -> Any:
    """The config of a network as timm exports it, which needs a change; None for any other.

    Args:
        source: Hub id or folder.
        written: what its `config.json` says.
        **kwargs: of `from_pretrained`.
    """
    from transformers import AutoConfig

    model_args = written.get("model_args")
    if not isinstance(model_args, Mapping) or "num_classes" not in model_args:
        return None
    return _with_classes_once(AutoConfig.from_pretrained(source, **only(PLACES, kwargs), trust_remote_code=False))


def _with_classes_once(config: Any) -> Any:
    """The config without the number of classes that timm writes twice, and transformers would pass twice."""
    if config.model_type == "timm_wrapper" and config.model_args:
        config.model_args = {name: value for name, value in config.model_args.items() if name != "num_classes"}
    return config


def is_resnet(guide: str) -> bool:
    """Whether a guide is a ResNet, by its architecture."""
    if guide.startswith("timm/") and not os.path.isdir(guide):
        return "resnet" in guide
    from transformers import PreTrainedConfig

    try:
        config = PreTrainedConfig.get_config_dict(guide)[0]
    except OSError:  # which load_guide explains
        return False
    return "resnet" in str(config.get("architecture", config.get("model_type")))
