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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_guidance.similarity.grams import exact_float32, gram
from hf_guidance.similarity.matrices import ROUNDINGS, center, u_center, unit

TINY = 1e-20  # inside square roots: far below any Gram entry of a living layer (their diagonal averages 1)
ALL_INVARIANCES = frozenset({"orthogonal", "isotropic_scaling", "translation", "permutation"})

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
        kernel: for a measure that is the cosine of two kernels: Gram matrix → kernel, so that ``target_side`` and
            ``guide_side`` are `unit` of it and ``compare`` their inner product.
        centred_slope: whether the value's gradient in a centred Gram matrix is symmetric and centred as it is.
    """

    name: str
    min_samples: int
    target_side: Callable[[Tensor], Any]
    guide_side: Callable[[Tensor], Any]
    compare: Callable[[Any, Any], Tensor]
    invariant_to: frozenset[str] = ALL_INVARIANCES
    kernel: Callable[[Tensor], Tensor] | None = None
    centred_slope: bool = False

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


def _cosine(name: str, min_samples: int, kernel: Callable[[Tensor], Tensor], **options: Any) -> Measure:
    def side(gram_nn: Tensor) -> Tensor:
        return unit(kernel(gram_nn))

    return Measure(name, min_samples, side, side, _inner, kernel=kernel, **options)


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        _cosine("linear_cka", 3, lambda kernel: kernel, centred_slope=True),
        _cosine("debiased_cka", 4, u_center),
        _cosine("rbf_cka", 3, lambda kernel: center(_rbf(kernel))),
        _cosine("rsa", 3, _cosines),
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

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(debiased_cka(x, x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).item(), 4)  # a rotation
        1.0
    """
    return MEASURES["debiased_cka"](features_target, features_guide)


def rbf_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """CKA of Gaussian kernels ``exp(−‖x_i − x_j‖² / 2σ²)``, σ the median distance between two samples.

    Source: Kornblith et al. 2019, section 3 (there σ is a fraction of the median distance; here it is the median).

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(rbf_cka(x, 0.5 * x - 1).item(), 4)  # scale and shift
        1.0
    """
    return MEASURES["rbf_cka"](features_target, features_guide)


def rsa(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Representational similarity analysis: Pearson correlation of the two sets of n(n−1)/2 cosine similarities.

    The features are centred first; the diagonal is left out.

    Source: Kriegeskorte et al. 2008, "Representational similarity analysis".

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(rsa(x, 9 * x).item(), 4)
        1.0
    """
    return MEASURES["rsa"](features_target, features_guide)


def ridge(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """R² of the ridge regression that predicts the guide's features from the target's, λ = 0.1 · tr(K)/n.

    On the samples it is fitted to, variance-weighted over the guide's features; not symmetric.

    Source: Subramaniam et al. 2025 names ridge regression as a measure; the definition and λ are ours.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> ridge(x, x[:, :1]) > 0.9  # a part of the target is predicted well
        tensor(True)
    """
    return MEASURES["ridge"](features_target, features_guide)


def procrustes(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Best alignment by a rotation: nuclear norm of ``X̃ᵀỸ`` over ``‖X̃‖ ‖Ỹ‖``.

    Source: Williams et al. 2021, "Generalized shape metrics on neural representations", the cosine of their angle.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(procrustes(x, x.flip(1)).item(), 4)  # a reflection
        1.0
    """
    return MEASURES["procrustes"](features_target, features_guide)
