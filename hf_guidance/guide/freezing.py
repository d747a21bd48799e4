"""Freezing of guides, their batch norm, and checks that guide and target are separate networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hf_guidance.config import GuidanceConfig
from hf_guidance.features.inside import check_is_network
from hf_guidance.guide.own_base import BASE, OwnBase, adapters_in

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def freeze(guide: nn.Module, batch_norm: str = "eval", device: torch.device | None = None) -> nn.Module:
    """Freeze a guide in place: no gradients, evaluation mode, and the given batch norm. Then move it.

    Args:
        guide: Network to freeze.
        batch_norm: `eval`, `calibrated` or `batch`. The first two use the running statistics. `batch` uses those of the
            batch, and does not change the running ones.
        device: Device to move it to. If None, the guide stays where it is, as do quantised guides and those with a
            device map.

    Returns:
        The guide.

    Raises:
        ValueError: If the guide has no batch norm, and the mode is not `eval`. Also if it has shapes but no weights.
    """
    placed = getattr(guide, "hf_device_map", None) or any(hasattr(module, "_hf_hook") for module in guide.modules())
    if not placed and any(parameter.is_meta for parameter in guide.parameters()):
        raise ValueError(
            f"the guide ({type(guide).__name__}) has no weights, as it is on the meta device: build it on another one, "
            "or load it with load_guide or from_pretrained."
        )
    guide.eval().requires_grad_(False)
    norms = [module for module in guide.modules() if isinstance(module, BATCH_NORM)]
    if batch_norm != "eval" and not norms:
        raise ValueError(f"guide_batch_norm={batch_norm!r}, but the guide ({type(guide).__name__}) has no batch norm.")
    for norm in norms:
        norm.train(batch_norm == "batch")
        norm.track_running_stats = batch_norm != "batch" and norm.running_mean is not None
    placed = placed or getattr(guide, "is_quantized", False)
    return guide if device is None or placed else guide.to(device)


@torch.no_grad()
def calibrate_batch_norm(guide: nn.Module, forwards: Iterable[Callable[[], Any]]) -> None:
    """Replace the running statistics by their average over some forwards. All else stays in evaluation mode.

    Args:
        guide: Frozen guide, or any network in evaluation mode.
        forwards: Each runs the network on one batch. None is called if it has no batch norm.
    """
    norms = [module for module in guide.modules() if isinstance(module, BATCH_NORM) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    try:
        for forward in forwards if norms else ():
            forward()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def check_apart(target: nn.Module, guide: nn.Module) -> None:
    """Raise ValueError if target and guide are one network, share parameters, or are wrapped by `torch.compile`.

    A guide that is the target's own base, from `load_guide_of_base(target)`, shares the base's parameters and may.
    """
    check_not_wrapped(target, "target")
    check_not_wrapped(guide, "guide")
    if isinstance(guide, OwnBase) and guide.is_of(target):
        return
    of_guide = guide.shared().values() if isinstance(guide, OwnBase) else guide.parameters()
    shared = {id(p) for p in target.parameters()} & {id(p) for p in of_guide}
    if guide is target or shared:
        has_adapters = " For the target without its adapters pass guide='base', or load_guide_of_base(target)."
        raise ValueError(
            f"the guide shares {len(shared)} parameters with the target, so it would not stay frozen; "
            "pass a copy (copy.deepcopy) or another network." + (has_adapters if adapters_in(target) else "")
        )


def check_not_wrapped(network: nn.Module, role: str) -> None:
    """Raise ValueError for a network that `torch.compile` or TorchScript returned."""
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(
            f"the {role} ({type(network).__name__}) is compiled by TorchScript, which does not show its layers: pass "
            "the module that torch.jit.script or torch.jit.trace was called with."
        )
    if hasattr(network, "_orig_mod"):
        raise ValueError(
            f"the {role} is the result of torch.compile({role}), which hides its layers and its arguments: call "
            f"{role}.compile() instead, which compiles it in place."
        )


def check_types(guide: nn.Module | str | None, guidance: GuidanceConfig | None, or_base: bool = False) -> None:
    """Raise ValueError for a guide or config of a wrong type, or for a guidance weight without a guide.

    Args:
        guide: What was given as the guide.
        guidance: What was given as settings.
        or_base: Whether the guide may be the word `base`.
    """
    if guide == BASE and not or_base:
        raise ValueError("guide is 'base', which a trainer alone takes: pass load_guide_of_base(target).")
    if isinstance(guide, str) and guide != BASE:
        raise ValueError(f"guide is {guide!r}; expected a network: use load_guide({guide!r}), or pass an nn.Module.")
    if guide is not None and guide != BASE:
        check_is_network(guide, "guide")
    if guidance is not None and not isinstance(guidance, GuidanceConfig):
        raise ValueError(f"guidance is a {type(guidance).__name__}; expected a GuidanceConfig.")
    if guide is None and guidance is not None and guidance.guidance_weight:
        raise ValueError(
            f"guidance_weight is {guidance.guidance_weight}, but there is no guide: pass guide=load_guide(...), or "
            "guidance_weight=0 to train without guidance."
        )
