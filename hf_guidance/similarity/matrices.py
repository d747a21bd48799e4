"""Centring, norms and inner products of square matrices, one or many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDINGS = 16  # Gram entries below this many roundings of the mean diagonal carry no signal
DOT_BLOCK = 2**16  # most products for a CPU to add up in one sum


def center(kernel: Tensor) -> Tensor:
    """Subtract row and column means of a symmetric matrix `(n, n)`: `H K H` with `H = I − 11ᵀ/n`."""
    mean = kernel.mean(0)
    return kernel - mean[:, None] - (mean - mean.mean())[None, :]


def center_in_place(kernel: Tensor) -> Tensor:
    """Do as `center` in place, for one matrix or several."""
    mean = kernel.mean(-1, keepdim=True)
    return kernel.sub_(mean).sub_(mean.mT - mean.mean(-2, keepdim=True))


def u_center(kernel: Tensor) -> Tensor:
    """U-centre a kernel matrix `(n, n)`, n ≥ 3. Products of two such matrices estimate HSIC without bias, up to scale.

    Source: Székely & Rizzo 2014, "Partial distance correlation with methods for dissimilarities", eq. 2.2.
    """
    n = kernel.shape[0]
    hollow = kernel - torch.diag(kernel.diagonal())
    mean = hollow.sum(1) / (n - 2)
    mean = mean - mean.sum() / (2 * (n - 1))
    centred = hollow - mean[:, None] - mean[None, :]
    return centred - torch.diag(centred.diagonal())


def unit(kernel: Tensor) -> Tensor:
    """Scale a matrix to Frobenius norm 1. A matrix that is zero up to rounding becomes zero, without a gradient."""
    return kernel * inverse_norms([kernel])[0]


def inverse_norms(kernels: Sequence[Tensor]) -> Tensor:
    """Compute one over the Frobenius norm of each matrix; 0 for a matrix that is zero up to rounding."""
    return inverse_of(torch.stack([norms(kernel) for kernel in kernels]), len(kernels[0]))


def norms(matrices: Tensor) -> Tensor:
    """Compute Frobenius norms of `(…, n, m)`.

    A CPU adds up all squares in one sum, and a sum of a million squares is wrong in the fifth digit. There the norms of
    the rows are computed first.
    """
    if matrices.device.type != "cpu":
        return torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrices, dim=-1), dim=-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the sum of the products of two matrices' entries, on a CPU block by block.

    One long sum on a CPU is inexact, as in `norms`.
    """
    a, b = a.flatten(), b.flatten()
    if a.device.type != "cpu" or len(a) <= DOT_BLOCK:
        return torch.dot(a, b)
    return torch.stack([torch.dot(*parts) for parts in zip(a.split(DOT_BLOCK), b.split(DOT_BLOCK), strict=True)]).sum()


def inverse_of(sizes: Tensor, n: int) -> Tensor:
    """Compute one over each norm of `n × n` matrices, as `inverse_norms` does."""
    zero = sizes <= ROUNDINGS * torch.finfo(sizes.dtype).eps * n
    return torch.where(zero, torch.inf, sizes).reciprocal()
