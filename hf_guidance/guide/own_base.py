"""A target's own base as its guide: the same weights with the adapters off, so that no second network is needed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_guidance.config import GuidanceConfig
from hf_guidance.features.inside import check_is_network, transformer_in
from hf_guidance.features.reader import base_model_of

BASE = "base"  # what a trainer's `guide` may be, beside a network
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# settings of `init_lora_weights` that take a part of the base's weights out of it, or round them
MOVES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# names of the base's own module inside PEFT's modules: of adapted layers, of trained tokens, of trained copies
OF_THE_BASE = ("base_layer", "token_adapter", "original_module")
MOST_NAMED = 3  # weights in an error


class OwnBase(nn.Module):
    """The base of a target as its guide: a forward runs the target's own modules without adapters and without dropout.

    The target is no part of this module. Whatever is done to the guide, such as freezing it, does not reach the shared
    weights.

    Args:
        target: Network whose modules hold adapters.
    """

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.__dict__["target"] = target  # not registered as a submodule

    @property
    def config(self) -> Any:
        """The config of the base."""
        network: Any = self.get_base_model()
        return network.config

    def get_base_model(self) -> nn.Module:
        """Return the network inside the target's wrapper; the adapters are inside its layers."""
        return base_model_of(self.__dict__["target"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base. Modes and adapters of the target are restored at the end, after an error too."""
        with _as_base(self.__dict__["target"]):
            return self.get_base_model()(*args, **kwargs)

    def is_of(self, target: nn.Module) -> bool:
        """Tell whether this is the base of that very target."""
        return self.__dict__["target"] is target

    def shared(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the base, which are the target's own, by their names in a base without adapters."""
        network = self.get_base_model()
        named = dict(network.named_parameters(remove_duplicate=False))
        return {own: named[name] for name, own in _own_names(network, named)}

    def weights(self) -> dict[str, Tensor]:
        """Return the state of the base without the adapters, as a base that never had any would return it."""
        network = self.get_base_model()
        state = network.state_dict()
        return {own: state[name] for name, own in _own_names(network, state)}

    def origin(self) -> dict[str, Any]:
        """Return where the base comes from, as far as its config tells, for checkpoints and cards."""
        config = getattr(self, "config", None)
        name = getattr(config, "_name_or_path", None) or None
        if name is not None and (os.path.isdir(name) or not HUB_ID.fullmatch(name)):
            name = Path(name).name  # no local path in cards
        revision = getattr(config, "_commit_hash", None) if name else None
        return {"source": name, "untrained": None, "seed": None, "revision": revision, "own_base": True}

    def check(self, config: GuidanceConfig | None = None) -> None:
        """Raise ValueError if the base would not stay as it is, or a setting needs a guide with weights of its own.

        Args:
            config: Settings of guidance; None checks the base alone.
        """
        target: nn.Module = self.__dict__["target"]
        _check_has_adapters(target)
        _check_stays(target, self)
        if config is None:
            return
        norm = config.guide_batch_norm
        settings = {
            "shard_guide=True": config.shard_guide,
            "save_guide=True": config.save_guide,
            f"guide_batch_norm={norm!r}": norm != "eval",
        }
        for setting in (name for name, given in settings.items() if given):
            raise ValueError(
                f"{setting} needs a guide with weights of its own, but this guide is the target's own base: leave the "
                "setting out, or pass a copy of the base (load_guide) as the guide."
            )


def load_guide_of_base(target: nn.Module) -> OwnBase:
    """Make the guide of a target with adapters that is the target's own base: no second network is held in memory.

    The guide runs on the target's modules, with all adapters off and in evaluation mode. Modes, weights, buffers and
    adapters of the target are afterwards as they were. `GuidanceTrainer(..., guide="base")` calls this function.

    Args:
        target: PEFT model, or a network with `add_adapter`, without a wrapper such as DDP. Its base must be frozen, as
            PEFT leaves it.

    Returns:
        The guide. It has no parameters of its own.

    Raises:
        ValueError: If the target is no network or has no adapters, they are merged, or the base is not what it was
            before the adapters, or would not stay so: a weight of it is trained, or batch norm moves its statistics.

    Example:
        >>> guidance = GuidanceLoss(target, load_guide_of_base(target), GuidanceConfig())  # doctest: +SKIP
    """
    check_is_network(target, "target")
    guide = OwnBase(transformer_in(target))
    guide.check()
    return guide.eval()


@contextmanager
def _as_base(target: nn.Module) -> Iterator[None]:
    """Switch off adapters and training mode inside this context.

    PEFT's own context would switch on gradients of all adapters at its end, of frozen ones too.
    """
    switches = [(module, module._disable_adapters) for module, _ in adapters_in(target).values()]
    modes = [(module, module.training) for module in target.modules()]
    try:
        for module, _ in switches:
            module._disable_adapters = True
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, was in switches:
            module._disable_adapters = was
        for module, was in modes:
            module.training = was


def adapters_in(network: nn.Module) -> dict[str, tuple[Any, str]]:
    """Find the modules that hold PEFT's adapters: name → module, and the name of the base's own module inside it."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, tuple[Any, str]] = {}
    kinds: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            found[name] = module, next((own for own in OF_THE_BASE if own in module._modules), "")
    return found


def _own_names(network: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each name that belongs to the base, with its name in a base that never had adapters."""
    inside = {name: own for name, (_, own) in adapters_in(network).items()}
    for name in names:
        kept: list[str] = []
        parts, place = name.split("."), ""
        for part in parts:
            wanted = inside.get(place)
            if wanted is not None and part != wanted:
                break
            if wanted is None:
                kept.append(part)
            place = f"{place}.{part}".removeprefix(".")
        else:
            yield name, ".".join(kept)


def _check_has_adapters(target: nn.Module) -> None:
    wrappers = adapters_in(target)
    if not wrappers:
        raise ValueError(
            f"guide='base' is the target without its adapters, but the target ({type(target).__name__}) has no layers "
            "with adapters: add some with peft.get_peft_model (LoRA or another kind that adapts layers), or pass "
            "another network as the guide."
        )
    kinds = {type(module).__name__ for module, own in wrappers.values() if not own}
    if kinds:
        raise ValueError(
            f"guide='base' cannot tell base and adapters apart in {', '.join(sorted(kinds))}: use another kind of "
            "adapter (LoRA), or pass a copy of the base (load_guide) as the guide."
        )
    if any(getattr(module, "merged", False) for module, _ in wrappers.values()):
        raise ValueError(
            "the target's adapters are merged into its base, which is then not the base any more: call "
            "unmerge_adapter() before training."
        )
    for name, config in (getattr(target, "peft_config", None) or {}).items():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
            raise ValueError(
                f"adapter {name!r} has init_lora_weights={start!r}, which changes the weights of the base, so that the "
                "base without adapters is not the network that it was. Use another initialisation, or pass a copy of "
                "the base (load_guide) as the guide."
            )


def _check_stays(target: nn.Module, guide: OwnBase) -> None:
    trained = [name for name, weight in guide.shared().items() if weight.requires_grad]
    copy = "or pass a copy of the base (load_guide) as the guide."
    if trained:
        more = f" and {len(trained) - MOST_NAMED} more" if len(trained) > MOST_NAMED else ""
        raise ValueError(
            f"guide='base' needs a base that stays as it is, but {len(trained)} of its weights are trained "
            f"({', '.join(trained[:MOST_NAMED])}{more}): train adapters alone (bias='none' in the adapter's config, "
            f"requires_grad_(False) for the base), {copy}"
        )
    norms = [module for module in target.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    moving = sum(norm.running_mean is not None for norm in norms)
    if moving:
        raise ValueError(
            f"guide='base' needs a base that stays as it is, but the running statistics of its {moving} batch norm "
            f"layers move in training: use a base without batch norm, {copy}"
        )
