"""R² of the ridge regression of the guide's features on the target's, in-sample and leave-one-out, in both forms.

With the target's Gram matrix K and the penalty λ, the residuals of a fit are `M Y`, where `M = λ (K + λ I)⁻¹`. Their
squares sum to the trace of `N = M L M`. Leaving sample i out divides its residual by `Mᵢᵢ − 1/n`, exactly. Both R² are
functions of M and of L, and their slope in K is `−M J M / λ`, with J their slope in M.

Of features X, `M = I − F Xᵀ` with `F = X (Xᵀ X + λ I)⁻¹`, so that no n × n matrix is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer


@dataclass
class Predictor:
    """Work on a target layer that its pairs share: its residual maker M, or the inverse from which M can be applied.

    Attributes:
        layer: the layer, without its graph.
        inverse: `(Xᵀ X + λ I)⁻¹` if primal, M if dual.
        weights: by which each sample's squared residual counts, `(n,)`; None for in-sample R².
        fit: F, if primal.
        is_alive: whether there is any signal.
        with_slope: whether slopes will be needed.
    """

    layer: Layer
    inverse: Tensor
    weights: Tensor | None
    fit: Tensor | None
    is_alive: Tensor
    with_slope: bool


@dataclass(frozen=True)
class Ridge:
    """R² of a ridge regression of the guide's features on the target's.

    Args:
        penalty: λ over the mean squared norm of the target's samples.
        leave_one_out: whether each sample is predicted from the others.
    """

    penalty: float
    leave_one_out: bool = False

    def prepare(self, layer: Layer, with_slope: bool) -> Predictor:
        """Do the work on a target layer that its pairs share."""
        fit = None
        if layer.form == "primal":
            x = layer.values
            inverse = _inverse(x.T @ x, self.penalty)
            fit = x @ inverse
            diagonal = 1 - (fit * x).sum(1)
        else:
            inverse = _inverse(layer.values, self.penalty) * self.penalty
            diagonal = inverse.diagonal()
        is_alive = layer.values.any()  # a dead layer predicts nothing, but for rounding
        weights = (diagonal - 1 / layer.samples).reciprocal().square() if self.leave_one_out else None
        return Predictor(layer, inverse, weights, fit, is_alive, with_slope)

    def compare(self, target: Predictor, guide: Layer) -> tuple[Tensor, Tensor | None]:
        """Compute R² of a pair, and its slope in the values of the target's layer, if that is needed."""
        n = guide.samples
        total = n * (n / (n - 1)) ** 2 if self.leave_one_out else n
        if target.fit is None:
            residual, slope = _dual(target, guide.gram(), self.penalty)
            energy = guide.gram().diagonal().sum()
        else:
            residual, slope, energy = _primal(target, guide, self.penalty)
        value = (energy * (total / n) - residual) / total * target.is_alive
        return value, None if slope is None else target.layer.tangent(slope / -total)


def _inverse(matrix: Tensor, penalty: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)


def _dual(target: Predictor, gram: Tensor, penalty: float) -> tuple[Tensor, Tensor | None]:
    """Compute the sum of squared residuals and its slope in K, from Gram matrices alone."""
    m, weights = target.inverse, target.weights
    ml = m @ gram
    squares = (ml * m).sum(1)  # the diagonal of M L M
    residual = squares.sum() if weights is None else (weights * squares).sum()
    if not target.with_slope:
        return residual, None
    half = ml if weights is None else weights[:, None] * ml  # J is this and its transpose, and what M does to weights
    j = half + half.T
    if weights is not None:
        j.diagonal().sub_(2 * weights * weights.sqrt() * squares)
    return residual, (m @ j @ m) / -penalty


def _primal(target: Predictor, guide: Layer, penalty: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute the sum of squared residuals, its slope in X, and the guide's energy, without n × n matrices of both."""
    x, f, weights = target.layer.values, target.fit, target.weights
    assert f is not None
    primal = guide.form == "primal"
    y = guide.values if primal else guide.gram()

    def guided(v: Tensor) -> Tensor:
        return y @ (y.T @ v) if primal else y @ v  # L v

    def left(v: Tensor) -> Tensor:
        return v - f @ (x.T @ v)  # M v

    diagonal = torch.linalg.vector_norm(y, dim=1).square() if primal else y.diagonal()
    if weights is None:
        return *_in_sample(target, guided(x), diagonal.sum(), penalty), diagonal.sum()
    lf = guided(f)
    mlf = left(lf)
    squares = diagonal - (x * (lf + mlf)).sum(1)  # the diagonal of M L M = L − X (L F)ᵀ − M L F Xᵀ
    residual = (weights * squares).sum()
    if not target.with_slope:
        return residual, None, diagonal.sum()
    w = weights[:, None]
    jf = w * mlf + guided(left(w * f)) - (2 * weights * weights.sqrt() * squares)[:, None] * f
    return residual, left(jf) * -2, diagonal.sum()


def _in_sample(target: Predictor, product: Tensor, energy: Tensor, penalty: float) -> tuple[Tensor, Tensor | None]:
    """Compute the sum of squared residuals and its slope in X, from X and L X alone.

    With `A = Xᵀ X + λ I`, `S = Xᵀ L X` and `Q = A⁻¹ S A⁻¹`, that sum is `tr L − tr A⁻¹ S − λ tr Q`.
    """
    x, inverse = target.layer.values, target.inverse
    inner = x.T @ product
    half = inverse @ inner
    q = half @ inverse
    residual = energy - half.trace() - penalty * q.trace()
    if not target.with_slope:
        return residual, None
    shared = penalty * (inverse @ q)
    slope = product @ (inverse + penalty * (inverse @ inverse))
    return residual, (slope - x @ (q + shared + shared.T)) * -2
