"""Procrustes similarity: the best alignment of two layers by a rotation or reflection, in both forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer


@dataclass
class Root:
    """Features of a layer, or in dual form a root R of its Gram matrix, `R Rᵀ = K`, and the inverse of the root."""

    layer: Layer
    root: Tensor
    inverse: Tensor | None
    with_slope: bool


class Rotation:
    """Nuclear norm of `Xᵀ Y` over the norms of X and Y."""

    def prepare(self, layer: Layer, with_slope: bool) -> Root:
        """Do the work on one layer that its pairs share."""
        if layer.form == "primal":
            return Root(layer, layer.values, None, with_slope)
        # eigh raises for NaN; NaN still reaches the result through K
        values, vectors = torch.linalg.eigh(layer.gram().nan_to_num(0, 0, 0))
        cutoff = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]  # below, eigenvalues are rounding
        root = torch.where(values > cutoff, values, 0).sqrt()
        inverse = torch.where(values > cutoff, 1 / root, 0)
        return Root(layer, vectors * root[..., None, :], (vectors * inverse[..., None, :]).mT, with_slope)

    def compare(self, target: Root, guide: Root) -> tuple[Tensor, Tensor | None]:
        """Compute the similarity of a pair, and its slope in the values of the target's layer, if that is needed."""
        n = target.layer.samples
        broken = 0 * sum(side.layer.values.sum((-2, -1)) for side in (target, guide))  # NaN or 0
        product = (target.root.mT @ guide.root).nan_to_num(0, 0, 0)
        left, singular, right = torch.linalg.svd(product, full_matrices=False)
        value = singular.sum(-1) / n + broken
        if not target.with_slope:
            return value, None
        turned = guide.root @ (right.mT @ left.mT)
        if target.inverse is None:
            return value, target.layer.tangent(turned / n)
        half = turned @ target.inverse / (2 * n)
        return value, target.layer.tangent(half + half.mT - target.root @ (target.inverse @ half))
