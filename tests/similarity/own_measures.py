"""Measures as a user writes them, imported by tests by name."""

from __future__ import annotations

import torch
from torch import Tensor


def negative_distance(x: Tensor, y: Tensor) -> Tensor:
    return -(x @ x.T - y @ y.T).square().mean()


def two_numbers(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x.sum(), y.sum()])


def number(x: Tensor, y: Tensor) -> float:
    return float(x.sum())


def nothing(x: Tensor, y: Tensor) -> Tensor:
    return x.sum() / 0


def constant(x: Tensor, y: Tensor) -> Tensor:
    return x.detach().sum() * 0


NOT_A_FUNCTION = 3


def root_of_nothing(x: Tensor, y: Tensor) -> Tensor:
    return (x * 0).square().sum().sqrt()


def total(x: Tensor, y: Tensor) -> Tensor:
    return x.sum()


def changing(x: Tensor, y: Tensor) -> Tensor:
    y -= 1
    return x.mul_(2).sum() * 0 + 1
