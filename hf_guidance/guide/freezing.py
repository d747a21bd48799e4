"""The guide as it is used: frozen, its batch norm as asked, and no part of the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def freeze(guide: nn.Module, batch_norm: str = "eval", device: torch.device | None = None) -> nn.Module:
    """Freeze a guide in place: no gradient, evaluation mode, batch norm as asked; then move it.

    Args:
        batch_norm: ``eval`` and ``calibrated`` use the running statistics; ``batch`` the batch's, leaving the running
            ones as they are.
        device: left where it is if None, quantised, or spread by a device map.

    Raises:
        ValueError: another mode than ``eval`` for a guide without batch norm.
    """
    guide.eval().requires_grad_(False)
    norms = [module for module in guide.modules() if isinstance(module, BATCH_NORM)]
    if batch_norm != "eval" and not norms:
        raise ValueError(f"guide_batch_norm={batch_norm!r}, but the guide ({type(guide).__name__}) has no batch norm.")
    for norm in norms:
        norm.train(batch_norm == "batch")
        norm.track_running_stats = batch_norm != "batch" and norm.running_mean is not None
    placed = getattr(guide, "hf_device_map", None) or getattr(guide, "is_quantized", False)
    return guide if device is None or placed else guide.to(device)


@torch.no_grad()
def calibrate_batch_norm(guide: nn.Module, forwards: Iterable[Callable[[], Any]]) -> None:
    """Replace the running statistics by the average over some forwards; everything else stays in evaluation mode."""
    norms = [module for module in guide.modules() if isinstance(module, BATCH_NORM) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    try:
        for forward in forwards:
            forward()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def check_apart(target: nn.Module, guide: nn.Module) -> None:
    """Raise ValueError if target and guide are one network or share parameters, or what stands for either is none."""
    check_not_wrapped(target, "target")
    check_not_wrapped(guide, "guide")
    shared = {id(p) for p in target.parameters()} & {id(p) for p in guide.parameters()}
    if guide is target or shared:
        raise ValueError(
            f"the guide shares {len(shared)} parameters with the target, so it would not stay frozen; "
            "pass a copy (copy.deepcopy) or another network."
        )


def check_not_wrapped(network: nn.Module, role: str) -> None:
    """Raise ValueError for what torch.compile returns."""
    if hasattr(network, "_orig_mod"):
        raise ValueError(
            f"the {role} is what torch.compile({role}) returned, which hides its layers and its arguments: call "
            f"{role}.compile() instead, which compiles it where it is."
        )
