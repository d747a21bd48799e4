"""The network inside a sentence-transformers model, whose layers are read."""

from __future__ import annotations

from typing import Any

from torch import nn

PACKAGE = "sentence_transformers."


def transformer_in(network: nn.Module, role: str = "target") -> Any:
    """Return the transformer inside a model of sentence-transformers; any other network itself.

    Args:
        network: Network without a wrapper such as DDP.
        role: `target` or `guide`, for messages.

    Returns:
        The network whose hidden states and modules are layers.

    Raises:
        ValueError: If a model of sentence-transformers holds no transformer, or several.
    """
    from transformers import PreTrainedModel

    if not is_sentence_transformer(network):
        return network
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{above}.") for above in found):
            found[name] = module
    if len(found) != 1:
        held = ", ".join(f"{name} ({type(module).__name__})" for name, module in found.items()) or "none"
        raise ValueError(
            f"the {role} ({type(network).__name__}) holds {len(found)} transformers ({held}); expected one, whose "
            "layers guidance can read. Pass a model with one transformer."
        )
    return next(iter(found.values()))


def is_sentence_transformer(network: Any) -> bool:
    """Tell whether a network is a model of sentence-transformers."""
    return any(cls.__module__.startswith(PACKAGE) for cls in type(network).__mro__)


def holds_transformer(network: nn.Module) -> bool:
    """Tell whether a network is one of transformers, or holds one."""
    from transformers import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) for module in network.modules())


def check_is_network(network: object, role: str) -> None:
    """Raise ValueError unless this is a live module, as a class of networks is not."""
    if isinstance(network, type):
        raise ValueError(
            f"{role} is the class {network.__name__}; expected a network: make one of it, such as "
            f"{network.__name__}(config), or load one with from_pretrained."
        )
    if isinstance(network, str):
        raise ValueError(f"{role} is {network!r}; expected a network: load it with from_pretrained({network!r}).")
    if not isinstance(network, nn.Module):
        raise ValueError(f"{role} is a {type(network).__name__}; expected a network, which is an nn.Module.")
