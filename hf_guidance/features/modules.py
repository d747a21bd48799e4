"""Modules of a network: found by name, glob or type, and described for messages."""

from __future__ import annotations

import difflib
import re

from torch import nn


def find_modules(model: nn.Module, pattern: str, role: str = "model") -> dict[str, nn.Module]:
    """Find modules by exact name, else by glob, else by type or base type, in the order of registration.

    A name or glob may be that of the network with its head or without it, as `transformer.h.*` and `h.*` of a GPT-2.

    Args:
        model: Network to search.
        pattern: Name, glob or name of a type.
        role: `target` or `guide`, for the message.

    Returns:
        Name in this network → module.

    Raises:
        ValueError: If none matches, or wildcards alone are to name the layers of a network of blocks. The message
            lists its modules.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if lists and pattern and not pattern.strip("*?."):
        raise ValueError(
            f"{role} layer {pattern!r} stands for modules of any name, heads and activations among them: name those "
            f"to compare, as {lists[0] + '.*'!r}, or use hidden_states. The {role} has {describe_modules(model)}."
        )
    body = getattr(model, "base_model_prefix", "")  # the network without its head, in transformers
    with_or_without = [f"{body}.{pattern}", pattern.removeprefix(f"{body}.")] if body else []
    for name in (pattern, *with_or_without):
        if name in modules:
            return {name: modules[name]}
        expression = re.compile(_glob_to_regex(name))
        if found := {name: module for name, module in modules.items() if expression.fullmatch(name)}:
            return found
        if found := {n: m for n, m in modules.items() if name in (c.__name__ for c in type(m).__mro__)}:
            return found
    close = difflib.get_close_matches(pattern, [*modules, *{type(m).__name__ for m in modules.values()}], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{role} layer {pattern!r} not found; the {role} has {describe_modules(model)}.{hint}")


def _glob_to_regex(pattern: str) -> str:
    tokens = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(tokens.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", pattern))


def describe_modules(model: nn.Module, most: int = 8) -> str:
    """Describe the shallowest modules, with numbered siblings joined: `wte (Embedding), 12 GPT2Block (h.0 … h.11)`.

    Args:
        model: Network to describe.
        most: Largest number of kinds to name.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            groups.setdefault((re.sub(r"\d+", "#", name), type(module).__name__), []).append(name)
    shallow = sorted(groups.items(), key=lambda group: group[0][0].count("."))[:most]
    words = [f"{n[0]} ({kind})" if len(n) == 1 else f"{len(n)} {kind} ({n[0]} … {n[-1]})" for (_, kind), n in shallow]
    more = f" and {len(groups) - most} more kinds" if len(groups) > most else ""
    return (", ".join(words) or "no modules") + more
