"""Measures of how similar two representations of the same n samples are.

A similarity of 1 means the same geometry. The public functions (`linear_cka`, …) take features `(n, d_target)` and
`(n, d_guide)`, and flatten further axes. They compute in float32 or better, and are differentiable in the first
argument. A *dead* layer, whose spread over the samples is within the rounding of its mean, has similarity 0 and no
gradient.
"""

from __future__ import annotations

from torch import Tensor

from hf_guidance.similarity.registry import MEASURES, PENALTIES, get_measure


def linear_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute centred kernel alignment `⟨K, L⟩ / (‖K‖ ‖L‖)` of linear kernels: the paper's measure, biased upwards.

    The bias grows with d/n: independent Gaussian features with d = 512 score 0.67 at n = 256.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the numbers of samples differ, or are below 3.

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
        ValueError: If the numbers of samples differ, or are below 4.

    Source: Song et al. 2012 (unbiased HSIC), in the U-centred form of Székely & Rizzo 2014, which is more stable.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(debiased_cka(x, x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).item(), 4)  # a rotation
        1.0
    """
    return MEASURES["debiased_cka"](features_target, features_guide)


def rbf_cka(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute CKA of Gaussian kernels `exp(−‖x_i − x_j‖² / 2σ²)`, with σ² the mean squared distance of two samples.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the numbers of samples differ, or are below 3.

    Source: Kornblith et al. 2019, section 3. There σ is a fraction of the median distance, whose slope lies in four
        samples alone.

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
        ValueError: If the numbers of samples differ, or are below 3.

    Source: Kriegeskorte et al. 2008, "Representational similarity analysis".

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(rsa(x, 9 * x).item(), 4)
        1.0
    """
    return MEASURES["rsa"](features_target, features_guide)


def ridge(features_target: Tensor, features_guide: Tensor, penalty: float = PENALTIES["ridge"]) -> Tensor:
    """Compute R² of the ridge regression of the guide's features on the target's, in-sample.

    R² is taken on the samples that the regression was fitted to. It is weighted by the variance of the guide's
    features, and is not symmetric. It is full where features outnumber samples: unrelated Gaussian features of width
    2048 score 0.99 at n = 32 and 0.98 at n = 512. There use `ridge_loo`.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.
        penalty: Ridge penalty λ, relative to the mean squared norm of the target's samples, tr K / n. Below 1e-4
            float32 loses digits.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the numbers of samples differ, or are below 3, or the penalty is not above 0.

    Source: Subramaniam et al. 2025 names ridge regression as a measure; the definition and λ are ours.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> ridge(x, x[:, :1]) > 0.9  # a part of the target is predicted well
        tensor(True)
    """
    return get_measure("ridge", penalty)(features_target, features_guide)


def ridge_loo(features_target: Tensor, features_guide: Tensor, penalty: float = PENALTIES["ridge_loo"]) -> Tensor:
    """Compute the leave-one-out R² of the ridge regression of the guide's features on the target's, with an intercept.

    Each sample is predicted from all others, in closed form; λ stays that of all samples. Without a mask that is exact.
    Unrelated Gaussian features score below 0: of width 100 at n = 256 about −0.2 at the default penalty and −0.9 at
    0.1, of width 2048 at n = 32 about 0. Samples with nearly all of the energy can make it −4. Nothing is clamped.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.
        penalty: Ridge penalty λ, relative to the mean squared norm of the target's samples, tr K / n. Below 1e-4
            float32 loses digits.

    Returns:
        A scalar of at most 1.

    Raises:
        ValueError: If the numbers of samples differ, or are below 3, or the penalty is not above 0.

    Source: Allen 1974, "The relationship between variable selection and data augmentation and a method for prediction"
        (the closed form, as PRESS).

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0], [3.0, 2.0], [1.0, 1.0]])
        >>> round(ridge_loo(x, x @ torch.tensor([[1.0], [2.0]]), penalty=0.01).item(), 2)
        1.0
    """
    return get_measure("ridge_loo", penalty)(features_target, features_guide)


def procrustes(features_target: Tensor, features_guide: Tensor) -> Tensor:
    """Compute the best alignment by a rotation or reflection: the nuclear norm of `X̃ᵀỸ` over `‖X̃‖ ‖Ỹ‖`.

    With more features than samples it is computed from Gram matrices, in which float32 keeps no singular value below
    3e-4 of the largest: with a spectrum that falls as k⁻², it is then off by up to 4e-3, and its gradient by more. Use
    float64 features there.

    Args:
        features_target: `(n, d_target)`.
        features_guide: `(n, d_guide)`, of the same samples.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the numbers of samples differ, or are below 3.

    Source: Williams et al. 2021, "Generalized shape metrics on neural representations", the cosine of their angle.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [4.0, 4.0]])
        >>> round(procrustes(x, x.flip(1)).item(), 4)  # a reflection
        1.0
    """
    return MEASURES["procrustes"](features_target, features_guide)
