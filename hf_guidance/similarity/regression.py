"""R² of the ridge regression of the guide's features on the target's, in-sample and leave-one-out, in both forms.

With the target's Gram matrix K and the penalty λ, the residuals of a fit are `E = M Y`, where `M = λ (K + λ I)⁻¹`.
Leaving sample i out divides its residual by `Mᵢᵢ − 1/n`, exactly. Of features X, with `A = Xᵀ X + λ I` and the
coefficients `W = A⁻¹ Xᵀ Y`, the residuals are `Y − X W`, and no n × n matrix is needed. Everything is computed from the
residuals: where a few samples are large, differences of larger terms lose all digits in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer
from hf_guidance.similarity.matrices import over_matrix, plus_product


@dataclass
class Predictor:
    """Work on a layer that its pairs share, each part done once it is needed.

    Args:
        layer: The layer, without its graph.
        penalty: λ over the mean squared norm of the samples, which is 1.
        leave_one_out: Whether each sample is predicted from the others.
        with_slope: Whether slopes will be needed.
    """

    layer: Layer
    penalty: float
    leave_one_out: bool
    with_slope: bool

    @cached_property
    def is_alive(self) -> Tensor:
        """Tell whether there is any signal; a dead layer predicts nothing."""
        return self.layer.values.flatten(-2).any(-1)

    @cached_property
    def inverse(self) -> Tensor:
        """Return `A⁻¹` of a primal layer."""
        return _inverse(self.layer.values.mT @ self.layer.values, self.penalty)

    @cached_property
    def fit(self) -> Tensor:
        """Return `X A⁻¹` of a primal layer."""
        return self.layer.values @ self.inverse

    @cached_property
    def residual_maker(self) -> Tensor:
        """Return M, `(n, n)`, from the Gram matrix."""
        return self.penalty * _inverse(self.layer.gram(), self.penalty)

    def weights(self, diagonal: Tensor) -> Tensor | None:
        """Return by which each sample's squared residual counts, from the diagonal of M; None if all count alike."""
        return (diagonal - 1 / diagonal.shape[-1]).reciprocal().square() if self.leave_one_out else None


@dataclass(frozen=True)
class Ridge:
    """R² of a ridge regression of the guide's features on the target's.

    Args:
        penalty: λ over the mean squared norm of the target's samples.
        leave_one_out: Whether each sample is predicted from the others.
    """

    penalty: float
    leave_one_out: bool = False

    def prepare(self, layer: Layer, with_slope: bool) -> Predictor:
        """Make what the pairs of a layer share."""
        return Predictor(layer, self.penalty, self.leave_one_out, with_slope)

    def compare(self, target: Predictor, guide: Predictor) -> tuple[Tensor, Tensor | None]:
        """Compute R² of a pair, and its slope in the values of the target's layer, if that is needed."""
        n = guide.layer.samples
        total = n * (n / (n - 1)) ** 2 if self.leave_one_out else float(n)  # of squares without a fit
        if target.layer.form == guide.layer.form == "primal":
            explained, slope = _of_features(target, guide.layer.values, total)
        else:
            explained, slope = _of_grams(target, guide.layer.gram(), total)
        return explained * target.is_alive, slope


def _inverse(matrix: Tensor, penalty: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return torch.cholesky_inverse(factor).masked_fill_(over_matrix(failed > 0), torch.nan)


def _of_features(target: Predictor, y: Tensor, total: float) -> tuple[Tensor, Tensor | None]:
    """Compute R² and its slope in X from features.

    With D the weights, the slope of the squared residuals is `−2 (M D E Wᵀ + E (D E)ᵀ F − M C F)`, where `F = X A⁻¹`
    and C is what the weights depend on.
    """
    x, n = target.layer.values, y.shape[-2]
    w = target.inverse @ (x.mT @ y)
    e = plus_product(y, x, w, alpha=-1)
    weights = target.weights(1 - torch.linalg.vecdot(target.fit, x)) if target.leave_one_out else None
    squares = torch.linalg.vector_norm(e, dim=-1).square()
    residual = squares.sum(-1) if weights is None else torch.linalg.vecdot(weights, squares)
    value = torch.linalg.vector_norm(y, dim=(-2, -1)).square() / n - residual / total
    if not target.with_slope:
        return value, None
    if weights is None:
        weighted, back = e, target.inverse @ w * target.penalty  # as Xᵀ E = λ W
    else:
        weighted = weights[..., None] * e
        back = target.inverse @ (x.mT @ weighted)
    slope = plus_product(weighted, x, back, alpha=-1) @ (w.mT * (2 / total))
    slope = plus_product(slope, e, back.mT * (2 / total))
    if weights is not None:
        changing = (2 / total * 2 * weights * weights.sqrt() * squares)[..., None] * target.fit
        slope = plus_product(slope - changing, target.fit, x.mT @ changing)
    return value, target.layer.tangent(slope)


def _of_grams(target: Predictor, gram: Tensor, total: float) -> tuple[Tensor, Tensor | None]:
    """Compute R² and its slope in the target's values from Gram matrices.

    The slope in K is `−M J M / λ`, where J is the slope of the squared residuals in M.
    """
    m = target.residual_maker
    weights = target.weights(m.diagonal(dim1=-2, dim2=-1))
    ml = m @ gram
    squares = torch.linalg.vecdot(ml, m)  # the diagonal of M L M
    residual = squares.sum(-1) if weights is None else torch.linalg.vecdot(weights, squares)
    value = gram.diagonal(dim1=-2, dim2=-1).mean(-1) - residual / total
    if not target.with_slope:
        return value, None
    half = ml if weights is None else weights[..., None] * ml
    j = half + half.mT
    if weights is not None:
        j.diagonal(dim1=-2, dim2=-1).sub_(2 * weights * weights.sqrt() * squares)
    slope = (m @ j @ m) / (target.penalty * total)
    return value, target.layer.tangent(slope if target.layer.form == "dual" else 2 * slope @ target.layer.values)
