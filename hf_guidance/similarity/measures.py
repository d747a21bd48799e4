"""Measures of how similar two representations of the same n samples are.

Each layer becomes an `n × n` Gram matrix (`gram`), and each similarity is a function of two Gram matrices. A similarity
of 1 means the same geometry. The public functions (`linear_cka`, …) take features `(n, d_target)` and `(n, d_guide)`,
and
flatten further axes. They compute in float32 or better, and are differentiable in the first argument. A *dead* layer,
whose spread over the samples is below the rounding of its mean, has similarity 0 and no gradient.

`MEASURES` holds the same measures in two stages for the guidance loss: work done once per layer, and work per pair.
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

TINY = 1e-20  # added inside square roots; far below any Gram entry of a living layer, whose mean diagonal is 1
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
    """Compute off-diagonal cosine similarities minus their mean; 0 on the diagonal and for a sample at the mean."""
    n = kernel.shape[0]
    at_mean = kernel.diagonal() <= ROUNDINGS * torch.finfo(kernel.dtype).eps  # a sample at the mean has no direction
    scale = torch.where(at_mean, 0, torch.where(at_mean, 1, kernel.diagonal()).rsqrt())
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=kernel.device)
    cosine = torch.where(off_diagonal, kernel * scale[:, None] * scale[None, :], 0)
    return torch.where(off_diagonal, cosine - cosine.sum() / (n * (n - 1)), 0)


def _ridge_residual(kernel: Tensor) -> Tensor:
    """Compute `λ (K + λ I)⁻¹`, which maps guide features to the residuals of their ridge regression on the target's."""
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
    """Compute `S` with `S Sᵀ = K`, and its pseudo-inverse. Eigenvalues below rounding count as zero."""
    # eigh raises for NaN; NaN still reaches the result through K
    values, vectors = torch.linalg.eigh(kernel.nan_to_num(0, 0, 0))
    cutoff = len(values) * torch.finfo(kernel.dtype).eps * values[-1]
    root = torch.where(values > cutoff, values, 0).sqrt()
    inverse = torch.where(values > cutoff, 1 / root, 0)
    return vectors * root, (vectors * inverse).T


def _with_roots(kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (kernel, *_roots(kernel))


def _nuclear(target: tuple[Tensor, Tensor, Tensor], guide: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Compute `‖X̃ᵀỸ‖_* / (‖X̃‖ ‖Ỹ‖)`. The gradient in K is in closed form: autograd's fails at repeated eigenvalues."""
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
    """Similarity of two Gram matrices in two stages, so that pairs with a common layer share its work.

    Args:
        name: name of the public function.
        min_samples: smallest number of samples for which the value is not a constant.
        target_side: Gram matrix of a target layer → what each pair of that layer needs. Differentiable.
        guide_side: the same for a guide layer. It need not be differentiable.
        compare: (target side, guide side) → similarity, a scalar.
        invariant_to: transformations of either representation that do not change the value.
        kernel: Gram matrix → kernel, for a measure that is the cosine of two kernels. `target_side` and `guide_side`
            are then `unit` of the kernel, and `compare` is their inner product.
        centred_slope: whether the gradient of the value in a centred Gram matrix is symmetric and centred.
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
    """Return the measure of a name.

    Raises:
        ValueError: the name is unknown. The message lists the known ones.
    """
    if name not in MEASURES:
        close = difflib.get_close_matches(name, MEASURES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown measure {name!r}; possible are {', '.join(MEASURES)}.{hint}")
    return MEASURES[name]


# -------------------------------------------------------------------------------------------- the public functions


def linear_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute centred kernel alignment `⟨K, L⟩ / (‖K‖ ‖L‖)` of linear kernels: the paper's measure, biased upwards.

    The bias grows with d/n: independent Gaussian features with d = 512 score 0.67 at n = 256.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: the numbers of samples differ, or are below 3.

    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited", eq. 1 to 3.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(linear_cka(x, 3 * x + 7).item(), 4)
        1.0
    """
    return MEASURES["linear_cka"](features_target, features_guide)


def debiased_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute CKA with U-centred kernels: about 0 for independent features, whatever n and d.

    Args:
        features_target: `(n, d_target)`, n ≥ 4.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar of at most 1. It may be negative.

    Raises:
        ValueError: the numbers of samples differ, or are below 4.

    Source: Song et al. 2012 (unbiased HSIC), in the U-centred form of Székely & Rizzo 2014, which is more stable.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(debiased_cka(x, x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).item(), 4)  # a rotation
        1.0
    """
    return MEASURES["debiased_cka"](features_target, features_guide)


def rbf_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute CKA of Gaussian kernels `exp(−‖x_i − x_j‖² / 2σ²)`, with σ the median distance between two samples.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: the numbers of samples differ, or are below 3.

    Source: Kornblith et al. 2019, section 3 (there σ is a fraction of the median distance; here it is the median).

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(rbf_cka(x, 0.5 * x - 1).item(), 4)  # scale and shift
        1.0
    """
    return MEASURES["rbf_cka"](features_target, features_guide)


def rsa(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute the Pearson correlation of the n(n−1)/2 cosine similarities of each side.

    This is representational similarity analysis. The features are centred first. The diagonal is left out.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [−1, 1].

    Raises:
        ValueError: the numbers of samples differ, or are below 3.

    Source: Kriegeskorte et al. 2008, "Representational similarity analysis".

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(rsa(x, 9 * x).item(), 4)
        1.0
    """
    return MEASURES["rsa"](features_target, features_guide)


def ridge(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute R² of the ridge regression of the guide's features on the target's, with λ = 0.1 · tr(K)/n.

    R² is in-sample: it is taken on the samples that the regression was fitted to. It is weighted by the variance of the
    guide's features, and is not symmetric.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: the numbers of samples differ, or are below 3.

    Source: Subramaniam et al. 2025 names ridge regression as a measure; the definition and λ are ours.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> ridge(x, x[:, :1]) > 0.9  # a part of the target is predicted well
        tensor(True)
    """
    return MEASURES["ridge"](features_target, features_guide)


def procrustes(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute the best alignment by a rotation or reflection: the nuclear norm of `X̃ᵀỸ` over `‖X̃‖ ‖Ỹ‖`.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: the numbers of samples differ, or are below 3.

    Source: Williams et al. 2021, "Generalized shape metrics on neural representations", the cosine of their angle.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(procrustes(x, x.flip(1)).item(), 4)  # a reflection
        1.0
    """
    return MEASURES["procrustes"](features_target, features_guide)
