"""The config of a guide: from the Hub, a folder, or timm, whose own exports need a change."""

from __future__ import annotations

import copy
import os
from typing import Any


def config_of(source: Any, **kwargs: Any) -> Any:
    """The config of a config, a name of timm's, a folder or a Hub id."""
    from transformers import AutoConfig, PreTrainedConfig, TimmWrapperConfig

    if isinstance(source, PreTrainedConfig):
        return _with_classes_once(copy.deepcopy(source))
    if str(source).startswith("timm/") and not os.path.isdir(source):
        architecture = str(source).removeprefix("timm/")
        if in_timm(architecture):
            return TimmWrapperConfig(architecture=architecture)
    return _with_classes_once(AutoConfig.from_pretrained(source, **kwargs))


def config_if_timm_exported(source: Any, **kwargs: Any) -> Any:
    """The config of a network as timm exports it, which needs a change; None for any other, or with one given."""
    from transformers import AutoConfig, PreTrainedConfig

    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
    try:
        written = PreTrainedConfig.get_config_dict(source, **hub)[0]
    except OSError:  # which from_pretrained explains
        return None
    if "config" in kwargs or "num_classes" not in (written.get("model_args") or {}):
        return None
    return _with_classes_once(AutoConfig.from_pretrained(source, **hub))


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


def in_timm(name: Any) -> bool:
    """Whether timm has an architecture of that name."""
    import timm

    return bool(timm.is_model(str(name)))
