"""Measures that are the cosine of two kernels: linear and debiased CKA in both forms, RBF CKA and RSA of Gram matrices.

A similarity is `h(K, L) / √(h(K, K) h(L, L))`. For linear CKA, `h(K, L) = ⟨K, L⟩`. Of features this is `⟨X, L X⟩`, so
that no n × n matrix is needed. Debiased CKA is the same with U-centred kernels. For centred features X, U-centring K
takes n / (n − 2) times `kᵢ − tr K / (n (n − 1))` of each sample, its *excess*, from `K X`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer, halves_of
from hf_guidance.similarity.matrices import center, exact_float32, inner, over_matrix, plus_product, u_center

ROUNDINGS = 16  # a norm below this many roundings of the mean diagonal carries no signal
Kernel = Callable[[Tensor], Tensor]


@dataclass
class Side:
    """Work on one layer that its pairs share.

    Attributes:
        layer: The layer, without its graph.
        inverse: One over h(K, K); 0 if that is 0 up to rounding.
        kernel: Of a dual layer, its kernels `(parts, …, n, n)`.
        diagonal: Of a primal layer with U-centred kernels, the diagonal of its Gram matrix, `(n,)`.
        excess: Of such a layer, that of each sample, `(n,)`.
        own: Of a target layer, half the slope of h(K, K); of a primal one of one part `Xᵀ X`, from which it is made.
        pull: Slope in the kernel → slope in the values, of a kernel that is not the Gram matrix itself.
    """

    layer: Layer
    inverse: Tensor
    kernel: Tensor | None = None
    diagonal: Tensor | None = None
    excess: Tensor | None = None
    own: Tensor | None = None
    pull: Callable[[Tensor], Tensor] | None = None
    mean: Tensor | None = None  # of the kernels, once it is needed

    def dual(self, debiased: bool) -> Tensor:
        """Return the mean kernel over the parts, `(n, n)`."""
        if self.mean is None:
            if self.kernel is None:
                gram = self.layer.gram()
                self.mean = u_center(gram) if debiased else gram
            else:
                self.mean = self.kernel[0] if len(self.kernel) == 1 else self.kernel.mean(0)
        return self.mean


@dataclass(frozen=True)
class Cosine:
    """Cosine of two kernels.

    Args:
        debiased: Whether to U-centre the kernels.
        kernel: Differentiable function of a Gram matrix; None for the Gram matrix itself.
    """

    debiased: bool = False
    kernel: Kernel | None = None

    def prepare(self, layer: Layer, with_slope: bool) -> Side:
        """Do the work on one layer that its pairs share.

        Args:
            layer: A layer, whose graph is not used.
            with_slope: Whether slopes in this layer will be needed.
        """
        if self.kernel is not None:
            return _of_kernel(self.kernel, layer, with_slope)
        if layer.form == "primal":
            return _of_features(layer, self.debiased, with_slope)
        kernel = layer.values if layer.parts > 1 else layer.values[None]
        kernel = u_center(kernel) if self.debiased else kernel
        own = (kernel if layer.parts == 1 else kernel.flip(0) / 2) if with_slope else None
        return Side(layer, _inverse(inner(kernel[0], kernel[-1]), layer), kernel, own=own)

    def compare(self, target: Side, guide: Side) -> tuple[Tensor, Tensor | None]:
        """Compute the similarity of a pair, and its slope in the values of the target's layer, if that is needed."""
        scale = (target.inverse * guide.inverse).sqrt()
        if target.kernel is None:
            return _compare_features(target, guide, scale, self.debiased)
        other = guide.dual(self.debiased)
        common = inner(target.dual(self.debiased), other)
        if target.own is None:
            return common * scale, None
        share = common * target.inverse * scale
        slope = other * over_matrix(scale / target.layer.parts) - target.own * over_matrix(share)
        if target.pull is not None:
            return common * scale, target.pull(slope)
        return common * scale, slope if target.layer.parts > 1 else slope[0]


def _compare_features(target: Side, guide: Side, scale: Tensor, debiased: bool) -> tuple[Tensor, Tensor | None]:
    x, twice = target.layer.values, over_matrix(2 * scale)
    if guide.kernel is None:
        y = guide.layer.values
        cross = y.mT @ x
        common = cross.square().sum((-2, -1))
        if guide.excess is not None and target.diagonal is not None:
            common = common.sub(torch.linalg.vecdot(target.diagonal, guide.excess), alpha=_taken(target.layer))
        slope = y @ (cross * twice) if target.own is not None else None
    else:
        product = guide.dual(debiased) @ x
        common = inner(x, product)
        slope = product * twice if target.own is not None else None
    value = common * scale
    if slope is None or target.own is None:
        return value, None
    less = over_matrix(value * target.inverse * -2)
    if target.layer.parts > 1:
        slope.addcmul_(target.own, less, value=0.5)
    else:
        slope = plus_product(slope, x, target.own * less)
    excess = None if guide.excess is None else guide.excess[..., None] * twice
    if target.excess is not None and target.layer.parts == 1:
        own = target.excess[..., None] * less
        excess = own if excess is None else excess.add_(own)
    if excess is not None:
        slope.addcmul_(x, excess, value=-_taken(target.layer))
        slope.sub_(slope.sum(-2, keepdim=True), alpha=1 / x.shape[-2])
    return value, slope


def agreement_of_halves(layer: Layer, debiased: bool) -> float:
    """Compute by how much the kernels of a sketch's halves agree: their product over the mean of their squares.

    It is near 1 where the sketch keeps the geometry of the layer, and near 0 where it is noise; 1 without a sketch.
    """
    if layer.parts == 1:
        return 1.0
    gram = layer.values.detach()
    if layer.form == "primal":
        halves = halves_of(gram, 2) * 2**0.5
        with exact_float32(gram.device):
            gram = halves @ halves.mT
    kernel = u_center(gram) if debiased else gram
    squares = inner(kernel, kernel).sum()
    return float(2 * inner(kernel[0], kernel[1]) / squares) if squares > 0 else 1.0


def _inverse(norm: Tensor, layer: Layer, rounding: Tensor | None = None) -> Tensor:
    """Compute one over the squared norm of kernels of a layer; 0 for one that is 0 up to rounding.

    Args:
        norm: The squared norm.
        layer: The layer.
        rounding: Sum of the terms that were subtracted from each other to get it, whose rounding grows with the root of
            the samples; None if there are none.
    """
    epsilon = ROUNDINGS * torch.finfo(norm.dtype).eps
    certain = norm if rounding is None else norm.sub(rounding, alpha=epsilon * layer.samples**0.5)
    return norm.reciprocal().masked_fill_(certain <= (epsilon * layer.samples) ** 2, 0)


def _diagonal(features: Tensor) -> Tensor:
    """Compute the diagonal of `X Xᵀ`, `(…, n)`."""
    return torch.linalg.vector_norm(features, dim=-1).square()


def _taken(layer: Layer) -> float:
    """Return how many times its excess U-centring takes of a sample."""
    return layer.samples / (layer.samples - 2)


def _of_features(layer: Layer, debiased: bool, with_slope: bool) -> Side:
    if layer.parts > 1:
        return _of_halves(layer, debiased, with_slope)
    x = layer.values
    own = x.mT @ x
    norm, rounding, diagonal, excess = own.square().sum((-2, -1)), None, None, None
    if debiased:
        diagonal = _diagonal(x)
        excess = diagonal - 1 / (layer.samples - 1)  # as the trace is n; all of a dead layer is multiplied by 0
        norm, rounding = norm.sub(torch.linalg.vecdot(diagonal, excess), alpha=_taken(layer)), norm
    return Side(layer, _inverse(norm, layer, rounding), None, diagonal, excess, own if with_slope else None)


def _of_halves(layer: Layer, debiased: bool, with_slope: bool) -> Side:
    """Prepare a sketch in primal form, whose norm is the product of the kernels of its halves."""
    halves = halves_of(layer.values, 2) * 2**0.5
    others = halves.flip(0)
    products = others @ (others.mT @ halves)
    rounding, diagonal, excess = None, None, None
    if debiased:
        rounding, diagonals = inner(halves[0], products[0]), _diagonal(halves)
        every = diagonals - diagonals.mean(-1, keepdim=True) / (layer.samples - 1)
        products.addcmul_(every.flip(0)[..., None], halves, value=-_taken(layer))
        products -= products.mean(1, keepdim=True)
        diagonal, excess = _diagonal(layer.values), every.mean(0)
    own = torch.cat([*products], 1) * 2**0.5 if with_slope else None
    return Side(layer, _inverse(inner(halves[0], products[0]), layer, rounding), None, diagonal, excess, own)


def _of_kernel(function: Kernel, layer: Layer, with_slope: bool) -> Side:
    with torch.set_grad_enabled(with_slope):
        leaf = layer.gram().detach().requires_grad_(with_slope)
        made = function(leaf)[None]
    kernel = made.detach()

    def pull(slope: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(made, leaf, slope, retain_graph=True)
        return layer.tangent(found if layer.form == "dual" else (found + found.mT) @ layer.values)

    own, pull_back = (kernel, pull) if with_slope else (None, None)
    return Side(layer, _inverse(inner(kernel[0], kernel[0]), layer), kernel, own=own, pull=pull_back)


# ------------------------------------------------------------------------------------------------------- the kernels


def rbf(gram: Tensor) -> Tensor:
    """Compute the centred Gaussian kernel whose squared bandwidth is the mean squared distance of two samples."""
    n, diagonal = gram.shape[-1], gram.diagonal(dim1=-2, dim2=-1)
    squared = (diagonal[..., :, None] + diagonal[..., None, :] - 2 * gram).clamp(min=0)
    kernel = torch.exp(squared * (-(n - 1) / (4 * n)))  # the mean squared distance is 2 tr K / (n − 1), and tr K is n
    return center(kernel)


def off_diagonal_cosines(gram: Tensor) -> Tensor:
    """Compute off-diagonal cosine similarities minus their mean; 0 on the diagonal and for a sample at the mean."""
    n, diagonal = gram.shape[-1], gram.diagonal(dim1=-2, dim2=-1)
    at_mean = diagonal <= ROUNDINGS * torch.finfo(gram.dtype).eps  # a sample at the mean has no direction
    scale = torch.where(at_mean, 0, torch.where(at_mean, 1, diagonal).rsqrt())
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    cosine = torch.where(off_diagonal, gram * scale[..., :, None] * scale[..., None, :], 0)
    return torch.where(off_diagonal, cosine - cosine.sum((-2, -1), keepdim=True) / (n * (n - 1)), 0)
