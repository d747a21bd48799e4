"""Stacks of layers in a network, and which of them LayerDrop may skip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from torch import nn

Stack = tuple[str, list[str]]  # name of a module that may skip layers, and the names of its layers in order


def rate_of(module: nn.Module) -> float:
    """Return the LayerDrop rate of a module: its own `layerdrop`, else the largest in its config."""
    own = _own_rate(module)
    return max(_fields(module).values(), default=0.0) if own is None else own


def rate_setting(module: nn.Module) -> int | None:
    """Return the id of what holds a module's LayerDrop rate, the module or its config; None if neither does."""
    if _own_rate(module) is not None:
        return id(module)
    return id(module.config) if _fields(module) else None


def settings_of(base: nn.Module, module: nn.Module) -> dict[str, float]:
    """Return the LayerDrop settings of a module by name: fields of its config, else of the whole network's config."""
    own, found = _own_rate(module), _fields(module) or _fields(base)
    fields = {name: value for name, value in found.items() if value}
    if own is None or not own:
        return fields if own is None else {}
    alike = [name for name, value in fields.items() if value == own]
    side = [name for name in alike if name.removesuffix("_layerdrop") in type(module).__name__.lower()]
    return dict.fromkeys(side or alike or [f"{type(module).__name__}.layerdrop"], own)


def in_words(settings: Mapping[str, float]) -> str:
    """Format settings as they are written in code."""
    return ", ".join(f"{name}={value:g}" for name, value in settings.items())


def remedy(settings: Iterable[str]) -> str:
    """Tell how to turn LayerDrop off. Many modules read their config only when they are built."""
    return f"build the target with {in_words(dict.fromkeys(settings, 0))}"


def stack_of(base: nn.Module, kind: str) -> Stack | None:
    """Find the layers whose outputs are the hidden states of a kind.

    Returns:
        The stack, or None if none of its layers is ever skipped.

    Raises:
        ValueError: If some may be skipped, but it cannot be told which modules they are.
    """
    roots = _roots(base, kind)
    candidates = [find(base, root) for find in (_captured, _collected) for root in roots]
    if found := next((names for names in candidates if len(names) == 1), None):
        owner = found[0].rpartition(".")[0]
        if not rate_of(base.get_submodule(owner)):
            return None
        return owner, [f"{found[0]}.{name}" for name, _ in base.get_submodule(found[0]).named_children()]
    inside = [module for root in roots or [""] for module in base.get_submodule(root).modules()]
    skipping = next((module for module in inside if rate_of(module)), None)
    if skipping is None:
        return None
    settings = settings_of(base, skipping)
    raise ValueError(
        f"the target ({type(base).__name__}) skips layers in training ({in_words(settings)}), and the modules that "
        f"give its {kind} were not found: {remedy(settings)}, or name modules with target_layers."
    )


def stack_around(base: nn.Module, name: str) -> Stack | None:
    """Find the layer that a module is or lies in, if LayerDrop may skip it; None otherwise."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        owner = ".".join(parts[: i - 1])
        in_list = isinstance(base.get_submodule(".".join(parts[:i])), nn.ModuleList)
        if in_list and rate_of(base.get_submodule(owner)):
            return owner, [".".join(parts[: i + 1])]
    return None


# ------------------------------------------------------------------------------------------------------------ in detail


def _own_rate(module: nn.Module) -> float | None:
    own = getattr(module, "layerdrop", None)
    return float(own) if isinstance(own, (int, float)) else None


def _fields(module: nn.Module) -> dict[str, float]:
    config = getattr(module, "config", None)
    fields = vars(config) if hasattr(config, "__dict__") else {}
    return {name: float(v) for name, v in fields.items() if "layerdrop" in name and isinstance(v, (int, float))}


def _roots(base: nn.Module, kind: str) -> list[str]:
    """Name the modules to look for layers in.

    Of an encoder-decoder that is the side of this kind, else the whole network and then its decoder.
    """
    if kind == "encoder_hidden_states":
        encoder = _part(base, "get_encoder")
        return [encoder] if encoder else []
    decoder = _part(base, "get_decoder")
    is_encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return [decoder] if is_encoder_decoder else ["", decoder]


def _part(base: nn.Module, getter: str) -> str:
    part: Any = getattr(base, getter, lambda: base)()
    return next((name for name, module in base.named_modules() if module is part), "")


def _lists(base: nn.Module, root: str) -> dict[str, nn.ModuleList]:
    inside = base.get_submodule(root).named_modules(prefix=root)
    return {name: module for name, module in inside if isinstance(module, nn.ModuleList) and len(module)}


def _captured(base: nn.Module, root: str) -> list[str]:
    """Find module lists whose outputs transformers captures with hooks."""
    classes: tuple[type, ...] = ()
    for module in base.get_submodule(root).modules():
        specs = (getattr(module, "_can_record_outputs", None) or {}).get("hidden_states", [])
        found = [getattr(spec, "target_class", spec) for spec in (specs if isinstance(specs, list) else [specs])]
        classes += tuple(kind for kind in found if isinstance(kind, type))
    return [name for name, layers in _lists(base, root).items() if all(isinstance(m, classes) for m in layers)]


def _collected(base: nn.Module, root: str) -> list[str]:
    """Find layer lists whose owner may skip layers and collects their outputs itself."""
    lists = [name for name in _lists(base, root) if name.rpartition(".")[2] == "layers"]
    owners = {name: base.get_submodule(name.rpartition(".")[0]) for name in lists}
    asked = {name for name, owner in owners.items() if "output_hidden_states" in signature(owner.forward).parameters}
    found = [name for name, owner in owners.items() if name in asked and rate_setting(owner) is not None]
    return found or [name for name, owner in owners.items() if _own_rate(owner) is not None]
