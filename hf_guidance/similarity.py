"""How alike two representations of the same n samples are: Gram matrices and the measures on them.

Every layer becomes an ``n × n`` Gram matrix (`gram`), every similarity is a function of two Gram matrices, and 1 means
the same geometry. The public functions (`linear_cka`, …) take features ``(n, d_target)`` and ``(n, d_guide)`` (further
axes are flattened), work in float32 or better whatever the input's dtype, and are differentiable in the first argument.
A *dead* layer, whose spread over the samples is below the rounding of its mean, has similarity 0 and no gradient.

`MEASURES` holds the same measures cut where a guidance loss wants to cut them: what is done once per layer, and what is
left to do per pair of layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TINY = 1e-20  # inside square roots: far below any Gram entry of a living layer (their diagonal averages 1)
ROUNDINGS = 16  # Gram entries below so many roundings of their mean diagonal carry no signal
ALL_INVARIANCES = frozenset({"orthogonal", "isotropic_scaling", "translation", "permutation"})


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
        kernel, offset = _kernel(x.flatten(1)) if mask is None else _masked_kernel(x, mask.bool())
        kernel = center(kernel)  # also removes what rounding of the mean left behind
        energy = kernel.diagonal().mean().detach()
        rounding = 2 * torch.finfo(features.dtype).eps
        dead = energy <= rounding**2 * offset.detach()  # false for NaN, which must come through
        return torch.where(dead, 0, kernel / torch.where(dead, 1, energy))


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x̃ x̃ᵀ`` of the centred features, and the squared norm of what was subtracted from a sample."""
    mean = x.mean(0)
    centred = x - mean
    return centred @ centred.T, mean.square().sum()


def _masked_kernel(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The same over the valid entries, and the mean over the samples of what was subtracted from them."""
    x = x.reshape(*valid.shape, -1)
    m = valid.sum(0).to(x)  # (length,)
    mean = torch.where(valid[..., None], x, 0).sum(0) / m.clamp(min=1)[:, None]
    centred = torch.where(valid[..., None], x - mean, 0)
    # independent samples have E⟨x̃_i, x̃_j⟩ = −E[spread] / (m (m − 1)) at each position, for the mean is theirs; not 0
    lost = centred.square().sum((0, 2)) / (m * (m - 1)).clamp(min=1)
    kernel = centred.flatten(1) @ centred.flatten(1).T + (valid * lost) @ valid.to(x).T
    return kernel, (mean.square().sum(1) * m).sum() / len(x)


# ---------------------------------------------------------------------------------------- per layer, then per pair


def _inner(target: Tensor, guide: Tensor) -> Tensor:
    return (target * guide).sum()


def _rbf(kernel: Tensor) -> Tensor:
    diagonal = kernel.diagonal()
    squared = (diagonal[:, None] + diagonal[None, :] - 2 * kernel).clamp(min=0)
    n = kernel.shape[0]
    upper = squared[tuple(torch.triu_indices(n, n, offset=1, device=kernel.device))].sort().values
    middle = (upper[[(len(upper) - 1) // 2, len(upper) // 2]] + TINY).sqrt()
    return torch.exp(-squared / (2 * middle.mean().square()))


def _cosines(kernel: Tensor) -> Tensor:
    """Off-diagonal cosine similarities with their mean subtracted; 0 on the diagonal and for a sample at the mean."""
    n = kernel.shape[0]
    at_mean = kernel.diagonal() <= ROUNDINGS * torch.finfo(kernel.dtype).eps  # has no direction
    scale = torch.where(at_mean, 0, torch.where(at_mean, 1, kernel.diagonal()).rsqrt())
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=kernel.device)
    cosine = torch.where(off_diagonal, kernel * scale[:, None] * scale[None, :], 0)
    return torch.where(off_diagonal, cosine - cosine.sum() / (n * (n - 1)), 0)


def _ridge_residual(kernel: Tensor) -> Tensor:
    """``λ (K + λ I)⁻¹``, which maps guide features to the residuals of their ridge regression on the target's."""
    eye = torch.eye(kernel.shape[0], dtype=kernel.dtype, device=kernel.device)
    penalty = 0.1 * kernel.diagonal().mean()
    penalty = torch.where(penalty == 0, 1, penalty)
    factor, _ = torch.linalg.cholesky_ex(kernel + penalty * eye)
    return penalty * torch.cholesky_solve(eye, factor)


def _ridge_r2(residual: Tensor, guide: Tensor) -> Tensor:
    unexplained = ((residual @ guide) * residual).sum(1)
    return (guide.diagonal() - unexplained).sum()


@torch.no_grad()
def _roots(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """``S`` with ``S Sᵀ = K``, and its pseudo-inverse. Eigenvalues below rounding are zero, not their square roots."""
    values, vectors = torch.linalg.eigh(kernel.nan_to_num(0, 0, 0))  # raises for NaN, which K itself lets through
    cutoff = len(values) * torch.finfo(kernel.dtype).eps * values[-1]
    root = torch.where(values > cutoff, values, 0).sqrt()
    inverse = torch.where(values > cutoff, 1 / root, 0)
    return vectors * root, (vectors * inverse).T


def _with_roots(kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (kernel, *_roots(kernel))


def _nuclear(target: tuple[Tensor, Tensor, Tensor], guide: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``‖X̃ᵀỸ‖_* / (‖X̃‖ ‖Ỹ‖)``; its gradient in K is in closed form, as autograd's fails at repeated eigenvalues."""
    (kernel, root, inverse), (kernel_guide, root_guide, _) = target, guide
    with torch.no_grad():
        left, singular, right = torch.linalg.svd(root.T @ root_guide)
        half = root_guide @ right.T @ left.T @ inverse / 2
        slope = half + half.T - root @ inverse @ half  # d(Σ singular) = ⟨slope, dK⟩
        scale = (kernel_guide.trace() + TINY).sqrt()
    linear = (slope * kernel).sum()
    return (singular.sum() + linear - linear.detach()) / (scale * (kernel.trace() + TINY).sqrt())


@dataclass(frozen=True)
class Measure:
    """A similarity of two Gram matrices, in two stages so that pairs that share a layer share its work.

    Args:
        name: the public function's name.
        min_samples: fewest samples for which the value can differ from a constant.
        target_side: Gram matrix of a target layer → what every pair of that layer needs; differentiable.
        guide_side: the same for a guide layer; need not be differentiable.
        compare: (target side, guide side) → similarity, a scalar.
        invariant_to: transformations of either representation that leave the value as it is.
    """

    name: str
    min_samples: int
    target_side: Callable[[Tensor], Any]
    guide_side: Callable[[Tensor], Any]
    compare: Callable[[Any, Any], Tensor]
    invariant_to: frozenset[str] = ALL_INVARIANCES

    def __call__(self, features_target: Tensor, features_guide: Tensor) -> Tensor:
        n_target, n_guide = features_target.shape[0], features_guide.shape[0]
        if n_target != n_guide or n_target < self.min_samples:
            raise ValueError(
                f"{self.name}: got {n_target} target samples and {n_guide} guide samples; "
                f"both must describe the same samples, at least {self.min_samples} of them."
            )
        target, guide = gram(features_target), gram(features_guide)
        dtype = torch.promote_types(target.dtype, guide.dtype)
        with exact_float32(target.device):
            return self.compare(self.target_side(target.to(dtype)), self.guide_side(guide.to(dtype)))


def _symmetric(name: str, min_samples: int, side: Callable[[Tensor], Tensor]) -> Measure:
    return Measure(name, min_samples, side, side, _inner)


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        _symmetric("linear_cka", 3, unit),
        _symmetric("debiased_cka", 4, lambda kernel: unit(u_center(kernel))),
        _symmetric("rbf_cka", 3, lambda kernel: unit(center(_rbf(kernel)))),
        _symmetric("rsa", 3, lambda kernel: unit(_cosines(kernel))),
        Measure("ridge", 3, _ridge_residual, lambda kernel: kernel / (kernel.trace() + TINY), _ridge_r2),
        Measure("procrustes", 3, _with_roots, _with_roots, _nuclear),
    )
}


def get_measure(name: str) -> Measure:
    """Look a measure up by name. Raises ValueError, with the possible names, for an unknown one."""
    if name not in MEASURES:
        close = difflib.get_close_matches(name, MEASURES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown measure {name!r}; possible are {', '.join(MEASURES)}.{hint}")
    return MEASURES[name]


# -------------------------------------------------------------------------------------------- the public functions


def linear_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Centred kernel alignment ``⟨K, L⟩ / (‖K‖ ‖L‖)`` of centred linear kernels: the paper's measure, biased upwards.

    The bias grows with d/n: independent Gaussian features with d = 512 score 0.67 at n = 256.

    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited", eq. 1 to 3.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(linear_cka(x, 3 * x + 7).item(), 4)
        1.0
    """
    return MEASURES["linear_cka"](features_target, features_guide)


def debiased_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """CKA with U-centred kernels: about 0 for independent features, whatever n and d; may be negative; n ≥ 4.

    Source: Song et al. 2012 (unbiased HSIC), in the U-centred form of Székely & Rizzo 2014, which is stabler.
    """
    return MEASURES["debiased_cka"](features_target, features_guide)


def rbf_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """CKA of Gaussian kernels ``exp(−‖x_i − x_j‖² / 2σ²)``, σ the median distance between two samples.

    Source: Kornblith et al. 2019, section 3 (there σ is a fraction of the median distance; here it is the median).
    """
    return MEASURES["rbf_cka"](features_target, features_guide)


def rsa(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Representational similarity analysis: Pearson correlation of the two sets of n(n−1)/2 cosine similarities.

    The features are centred first; the diagonal is left out.

    Source: Kriegeskorte et al. 2008, "Representational similarity analysis".
    """
    return MEASURES["rsa"](features_target, features_guide)


def ridge(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """R² of the ridge regression that predicts the guide's features from the target's, λ = 0.1 · tr(K)/n.

    On the samples it is fitted to, variance-weighted over the guide's features; not symmetric.

    Source: Subramaniam et al. 2025 names ridge regression as a measure; the definition and λ are ours.
    """
    return MEASURES["ridge"](features_target, features_guide)


def procrustes(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Best alignment by a rotation: nuclear norm of ``X̃ᵀỸ`` over ``‖X̃‖ ‖Ỹ‖``.

    Source: Williams et al. 2021, "Generalized shape metrics on neural representations", the cosine of their angle.
    """
    return MEASURES["procrustes"](features_target, features_guide)
