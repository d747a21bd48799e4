"""Gram matrices: what a layer is, once its n samples have been compared with each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ROUNDINGS = 16  # Gram entries below so many roundings of their mean diagonal carry no signal


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off: a Gram matrix rounded to 8 or 10 bits is another statistic."""
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision if device.type == "cuda" else None
    with torch.autocast(device.type, enabled=False):
        if precision is not None:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if precision is not None:
                matmul.fp32_precision = precision


def center(kernel: Tensor) -> Tensor:
    """Subtract row and column means: ``H K H`` with ``H = I − 11ᵀ/n``."""
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()


def u_center(kernel: Tensor) -> Tensor:
    """U-centre a kernel matrix, so that inner products of two of them are unbiased (up to scale) estimates of HSIC.

    Source: Székely & Rizzo 2014, "Partial distance correlation with methods for dissimilarities", eq. 2.2.
    """
    n = kernel.shape[0]
    hollow = kernel - torch.diag(kernel.diagonal())
    mean = hollow.sum(1) / (n - 2)
    mean = mean - mean.sum() / (2 * (n - 1))
    centred = hollow - mean[:, None] - mean[None, :]
    return centred - torch.diag(centred.diagonal())


def unit(kernel: Tensor) -> Tensor:
    """Scale a matrix to Frobenius norm 1; one that is zero up to rounding becomes zero, without a gradient."""
    energy = kernel.square().sum()
    zero = energy <= (ROUNDINGS * torch.finfo(kernel.dtype).eps * len(kernel)) ** 2
    return torch.where(zero, 0, kernel / torch.where(zero, 1, energy).sqrt())


def gram(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gram matrix of the centred features, scaled to a mean diagonal of 1; zero for a dead layer.

    Args:
        features: ``(n, …)``; everything after the sample axis is one feature axis.
        mask: ``(n, length)``, true where valid, for features ``(n, length, …)``. A column's mean is then taken over its
            valid entries and the invalid ones are set to it; what such a mean takes from the product of two samples on
            average is given back, so that padding carries no signal of its own.

    Returns:
        ``(n, n)`` in float32 (float64 for float64 features). The scale is a constant for the gradient, which is exact
        all the same for every measure here: none depends on it.
    """
    if features.ndim < 2 or (mask is not None and features.shape[:2] != mask.shape):
        expected = "(n, d)" if mask is None else f"({mask.shape[0]}, {mask.shape[1]}, …), as the mask has it"
        raise ValueError(f"gram: features have shape {tuple(features.shape)}, expected {expected}.")
    with exact_float32(features.device):
        x = features if features.dtype == torch.float64 else features.float()
        coarse = torch.finfo(features.dtype).bits < 32
        kernel, offset = _kernel(x.flatten(1), coarse) if mask is None else _masked_kernel(x, mask.bool(), coarse)
        kernel = center(kernel)  # also removes what rounding of the mean left behind
        energy = kernel.diagonal().mean().detach()
        rounding = 2 * torch.finfo(features.dtype).eps
        dead = energy <= rounding**2 * offset.detach()  # false for NaN, which must come through
        return torch.where(dead, 0, kernel / torch.where(dead, 1, energy))


def _kernel(x: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
    """``x̃ x̃ᵀ`` of the centred features, and the squared norm of what was subtracted from a sample."""
    mean = x.mean(0)
    centred = x - mean
    return centred @ centred.T, _varying(mean, centred, coarse).square().sum()


def _varying(mean: Tensor, centred: Tensor, coarse: bool) -> Tensor:
    """The mean, without features that are one constant: they hold no rounding, which matters at 8 to 11 bits."""
    return torch.where((centred != 0).any(0), mean, 0) if coarse else mean


def _masked_kernel(x: Tensor, valid: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
    """The same over the valid entries, and the mean over the samples of what was subtracted from them."""
    x = x.reshape(*valid.shape, -1)
    m = valid.sum(0).to(x)  # (length,)
    mean = torch.where(valid[..., None], x, 0).sum(0) / m.clamp(min=1)[:, None]
    centred = torch.where(valid[..., None], x - mean, 0)
    # independent samples have E⟨x̃_i, x̃_j⟩ = −E[spread] / (m (m − 1)) at each position, for the mean is theirs; not 0
    lost = centred.square().sum((0, 2)) / (m * (m - 1)).clamp(min=1)
    kernel = centred.flatten(1) @ centred.flatten(1).T + (valid * lost) @ valid.to(x).T
    return kernel, (_varying(mean, centred, coarse).square().sum(1) * m).sum() / len(x)
