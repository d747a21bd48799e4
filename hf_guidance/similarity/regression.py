"""R² of the ridge regression of the guide's features on the target's, in-sample and leave-one-out, in both forms.

With the target's Gram matrix K and the penalty λ, the residuals of a fit are `M Y`, where `M = λ (K + λ I)⁻¹`. Their
squares sum to the trace of `N = M L M`. Leaving sample i out divides its residual by `Mᵢᵢ − 1/n`, exactly. Both R² are
functions of M and of L, and their slope in K is `−M J M / λ`, with J their slope in M.

Of features X, `M = I − F Xᵀ` with `A = Xᵀ X + λ I` and `F = X A⁻¹`, so that no n × n matrix is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer
from hf_guidance.similarity.matrices import outer


@dataclass
class Predictor:
    """Work on a target layer that its pairs share.

    Attributes:
        layer: The layer, without its graph.
        a: `Xᵀ X + λ I` if primal, else `K + λ I`.
        inverse: Its inverse.
        fit: F, if primal and leave-one-out.
        weights: By which each sample's squared residual counts, `(n,)`; None for in-sample R².
        is_alive: Whether there is any signal.
        with_slope: Whether slopes will be needed.
    """

    layer: Layer
    a: Tensor
    inverse: Tensor
    fit: Tensor | None
    weights: Tensor | None
    is_alive: Tensor
    with_slope: bool


@dataclass(frozen=True)
class Ridge:
    """R² of a ridge regression of the guide's features on the target's.

    Args:
        penalty: Λ over the mean squared norm of the target's samples.
        leave_one_out: Whether each sample is predicted from the others.
    """

    penalty: float
    leave_one_out: bool = False

    def prepare(self, layer: Layer, with_slope: bool) -> Predictor:
        """Do the work on a target layer that its pairs share."""
        x, primal = layer.values, layer.form == "primal"
        a = outer(x.T) if primal else x.clone()
        a.diagonal().add_(self.penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(a).L)
        fit = weights = None
        if self.leave_one_out:
            fit = x @ inverse if primal else None
            left = self.penalty * inverse.diagonal() if fit is None else 1 - torch.linalg.vecdot(fit, x)  # Mᵢᵢ
            weights = (left - 1 / layer.samples).reciprocal().square()
        energy = a.trace() - self.penalty * len(a)  # n or 0
        is_alive = ~(energy < layer.samples / 2)  # NaN stays NaN
        return Predictor(layer, a, inverse, fit, weights, is_alive, with_slope)

    def compare(self, target: Predictor, guide: Layer) -> tuple[Tensor, Tensor | None]:
        """Compute R² of a pair, and its slope in the values of the target's layer, if that is needed."""
        n = guide.samples
        total = n * (n / (n - 1)) ** 2 if self.leave_one_out else float(n)  # of squares without a fit
        if target.layer.form == "dual":
            explained, slope = _dual(target, guide, self.penalty, total)
        elif target.weights is None:
            explained, slope = _in_sample(target, guide, self.penalty, total)
        else:
            explained, slope = _leave_one_out(target, guide, self.penalty, total)
        return explained * target.is_alive, slope


def _dual(target: Predictor, guide: Layer, penalty: float, total: float) -> tuple[Tensor, Tensor | None]:
    """Compute R² and its slope in K from Gram matrices alone."""
    gram, m, weights = guide.gram(), penalty * target.inverse, target.weights
    ml = m @ gram
    squares = torch.linalg.vecdot(ml, m)  # the diagonal of N
    residual = squares.sum() if weights is None else weights @ squares
    value = gram.trace() / len(gram) - residual / total
    if not target.with_slope:
        return value, None
    half = ml if weights is None else weights[:, None] * ml  # J is this, its transpose, and what the weights depend on
    j = half + half.T
    if weights is not None:
        j.diagonal().sub_(2 * weights * weights.sqrt() * squares)
    return value, target.layer.tangent((m @ j @ m) / (penalty * total))


def _in_sample(target: Predictor, guide: Layer, penalty: float, total: float) -> tuple[Tensor, Tensor | None]:
    """Compute in-sample R² and its slope in X.

    With `S = Xᵀ L X` and `Q = A⁻¹ S A⁻¹`, the explained squares are `tr A⁻¹ S + λ tr Q`. The slope is centred as X and
    `L X` are, and the change of λ with the scale of X is its last term.
    """
    x, inverse, n = target.layer.values, target.inverse, guide.samples
    y = guide.values if guide.form == "primal" else guide.gram()
    common = y.T @ x if guide.form == "primal" else y @ x
    half = inverse @ (common.T @ common if guide.form == "primal" else x.T @ common)
    q = half @ inverse
    value = (half.trace() + penalty * q.trace()) / total
    if not target.with_slope:
        return value, None
    shared = penalty * (inverse @ q)
    of_x = q + shared + shared.T
    of_x.diagonal().add_(shared.trace() * (2 * penalty / n))
    of_guide = common @ (inverse + penalty * (inverse @ inverse)) * (2 / total)
    slope = y @ of_guide if guide.form == "primal" else of_guide
    return value, slope.addmm(x, of_x * (-2 / total))


def _leave_one_out(target: Predictor, guide: Layer, penalty: float, total: float) -> tuple[Tensor, Tensor | None]:
    """Compute leave-one-out R² and its slope `−2 M J F` in X, without n × n matrices other than the guide's."""
    x, f, weights = target.layer.values, target.fit, target.weights
    assert f is not None
    assert weights is not None
    primal = guide.form == "primal"
    y = guide.values if primal else guide.gram()
    diagonal = torch.linalg.vector_norm(y, dim=1).square() if primal else y.diagonal()
    seen = y.T @ f if primal else f
    lf = y @ seen  # L F
    mlf = torch.addmm(lf, f, x.T @ lf, alpha=-1)  # M L F
    squares = diagonal - torch.linalg.vecdot(x, lf) - torch.linalg.vecdot(x, mlf)  # of N = L − X (L F)ᵀ − M L F Xᵀ
    value = diagonal.mean() - (weights @ squares) / total
    if not target.with_slope:
        return value, None
    scaled = weights * (2 / total)
    wf = scaled[:, None] * f
    weighted = torch.addmm(y.T @ wf if primal else wf, seen, x.T @ wf, alpha=-1)  # of M D F, with D the weights
    jf = mlf.mul_(scaled[:, None]).addmm_(y, weighted)
    jf.addcmul_(f, (-2 * scaled * weights.sqrt() * squares)[:, None])
    change = x.T @ jf
    change += target.a * ((f * jf).sum() * (penalty / len(x)))  # λ changes with the scale of X, and X is F A
    jf.addmm_(f, change, alpha=-1)
    return value, jf.sub_(jf.mean(0))
