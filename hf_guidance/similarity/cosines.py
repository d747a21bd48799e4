"""Measures that are the cosine of two kernels: linear and debiased CKA in both forms, RBF CKA and RSA of Gram matrices.

A similarity is `h(K, L) / √(h(K, K) h(L, L))`. For linear CKA, `h(K, L) = ⟨K, L⟩`. Of features this is `⟨X, L X⟩`, so
that no n × n matrix is needed. Debiased CKA is the same with U-centred kernels. For centred features X, U-centring K
adds a multiple of each sample to `K X`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer
from hf_guidance.similarity.matrices import center_in_place, inner, u_center

ROUNDINGS = 16  # a norm below this many roundings of the mean diagonal carries no signal
Kernel = Callable[[Tensor], Tensor]


@dataclass
class Side:
    """Work on one layer that its pairs share.

    Attributes:
        layer: the layer, without its graph.
        kernel: of a dual layer, its kernels `(parts, n, n)`.
        added: of a primal layer, by how much of each sample `L X` differs from `Y Yᵀ X`, `(n, 1)`; None for no more.
        norm: h(K, K), a scalar.
        slope: half the slope of h(K, K) in the values of the layer, or in its kernel; None for a guide.
        pull: slope in the kernel → slope in the values, of a kernel that is not the Gram matrix itself.
    """

    layer: Layer
    norm: Tensor
    kernel: Tensor | None = None
    added: Tensor | None = None
    slope: Tensor | None = None
    pull: Kernel | None = None

    def dual(self, debiased: bool) -> Tensor:
        """Return the mean kernel over the parts, `(n, n)`."""
        if self.kernel is None:
            kernel = self.layer.gram()
            return u_center(kernel) if debiased else kernel
        return self.kernel[0] if len(self.kernel) == 1 else self.kernel.mean(0)

    def times(self, x: Tensor) -> Tensor:
        """Multiply the kernel by features `(n, d)`."""
        if self.kernel is None:
            return _times(self.layer.values, self.added, x)
        return self.dual(False) @ x


@dataclass(frozen=True)
class Cosine:
    """Cosine of two kernels.

    Args:
        debiased: whether to U-centre the kernels.
        kernel: differentiable function of a Gram matrix; None for the Gram matrix itself.
    """

    debiased: bool = False
    kernel: Kernel | None = None

    def prepare(self, layer: Layer, with_slope: bool) -> Side:
        """Do the work on one layer that its pairs share.

        Args:
            layer: a layer, whose graph is not used.
            with_slope: whether slopes in this layer will be needed.
        """
        if self.kernel is not None:
            return _of_kernel(self.kernel, layer, with_slope)
        if layer.form == "primal":
            return _of_features(layer, self.debiased, with_slope)
        kernel = layer.values if layer.parts > 1 else layer.values[None]
        kernel = u_center(kernel) if self.debiased else kernel
        return Side(layer, inner(kernel[0], kernel[-1]), kernel, slope=kernel.flip(0) / layer.parts)

    def compare(self, target: Side, guide: Side) -> tuple[Tensor, Tensor | None]:
        """Compute the similarity of a pair, and its slope in the values of the target's layer, if that is needed."""
        parts = target.layer.parts
        if target.kernel is None:
            x = target.layer.values
            slope = guide.times(x)
            common = inner(x, slope)
            slope = 2 * slope
        else:
            slope = guide.dual(self.debiased)
            common = inner(target.dual(self.debiased), slope)
            slope = (slope / parts).expand(parts, -1, -1)
        n = target.layer.samples
        scale = (_inverse(target.norm, n) * _inverse(guide.norm, n)).sqrt()
        value = common * scale
        if target.slope is None:
            return value, None
        slope = (slope - target.slope * (common * _inverse(target.norm, n))) * scale
        slope = slope if target.pull is None else target.pull(slope)
        return value, slope if slope.ndim == 2 or parts > 1 else slope[0]


def _inverse(norm: Tensor, n: int) -> Tensor:
    """Compute one over a squared norm of kernels `(n, n)` with mean diagonal 1; 0 for one that is 0 up to rounding."""
    least = (ROUNDINGS * torch.finfo(norm.dtype).eps * n) ** 2
    return norm.reciprocal().masked_fill(norm <= least, 0)


def _times(y: Tensor, added: Tensor | None, x: Tensor) -> Tensor:
    product = y @ (y.T @ x)
    return product if added is None else product.addcmul_(added, x)


def _added(features: Tensor) -> Tensor:
    """Compute what U-centring the kernel `X Xᵀ` of centred features adds to each sample, `(…, n, 1)`."""
    n = features.shape[-2]
    diagonal = features.square().sum(-1, keepdim=True)
    return diagonal.sum(-2, keepdim=True) / ((n - 1) * (n - 2)) - diagonal * (n / (n - 2))


def _of_features(layer: Layer, debiased: bool, with_slope: bool) -> Side:
    halves = layer.halves
    every = _added(halves) if debiased else None
    added = None if every is None else every.mean(0)
    if not with_slope:
        a, b = halves[0], halves[-1]
        norm = (a.T @ b).square().sum()
        if every is not None:
            norm = norm + (every[-1] * a.square()).sum()
        return Side(layer, norm, added=added)
    others = [
        _times(y, None if every is None else every[-1 - i], x)
        for i, (x, y) in enumerate(zip(halves, halves.flip(0), strict=True))
    ]
    slope = torch.cat(others, 1) * (2 / layer.parts**0.5)
    return Side(layer, inner(halves[0], others[0]), added=added, slope=slope)


def _of_kernel(function: Kernel, layer: Layer, with_slope: bool) -> Side:
    if not with_slope:
        kernel = function(layer.gram())[None]
        return Side(layer, inner(kernel[0], kernel[0]), kernel)
    with torch.enable_grad():
        leaf = layer.gram().detach().requires_grad_()
        made = function(leaf)[None]
    kernel = made.detach()

    def pull(slope: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(made, leaf, slope, retain_graph=True)
        return found if layer.form == "dual" else (found + found.T) @ layer.values

    return Side(layer, inner(kernel[0], kernel[0]), kernel, slope=kernel, pull=pull)


# ------------------------------------------------------------------------------------------------------- the kernels


def rbf(gram: Tensor) -> Tensor:
    """Compute the centred Gaussian kernel whose squared bandwidth is the mean squared distance of two samples."""
    n, diagonal = len(gram), gram.diagonal()
    squared = (diagonal[:, None] + diagonal[None, :] - 2 * gram).clamp(min=0)
    kernel = torch.exp(squared * (-(n - 1) / (4 * n)))  # the mean squared distance is 2 tr K / (n − 1), and tr K is n
    return center_in_place(kernel) if not kernel.requires_grad else _center(kernel)


def _center(kernel: Tensor) -> Tensor:
    mean = kernel.mean(0)
    return kernel - mean[:, None] - (mean - mean.mean())


def off_diagonal_cosines(gram: Tensor) -> Tensor:
    """Compute off-diagonal cosine similarities minus their mean; 0 on the diagonal and for a sample at the mean."""
    n = len(gram)
    at_mean = gram.diagonal() <= ROUNDINGS * torch.finfo(gram.dtype).eps  # a sample at the mean has no direction
    scale = torch.where(at_mean, 0, torch.where(at_mean, 1, gram.diagonal()).rsqrt())
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    cosine = torch.where(off_diagonal, gram * scale[:, None] * scale[None, :], 0)
    return torch.where(off_diagonal, cosine - cosine.sum() / (n * (n - 1)), 0)
