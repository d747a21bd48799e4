"""Dimension of what a layer shows of its samples: intrinsic, or how many directions share the variance."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

METHODS = ("two_nn", "participation_ratio")
DISCARDED = 0.1  # share of the samples with the largest ratios, which noise and borders make too large

TIED = 1e-5  # logarithm of the ratio of two distances, below which they are equal


@torch.no_grad()
def intrinsic_dimension(features: Tensor | ArrayLike, method: str = "two_nn") -> float:
    """Estimate the dimension of the set that a layer's features lie on.

    `two_nn` needs nothing but each sample's distances to its two nearest neighbours, and follows curved sets. It is too
    low where samples are few for the dimension: at 1000 samples from about 20 on. `participation_ratio` is the number
    of directions that share the variance, (Σ λ)² / Σ λ² of the covariance's eigenvalues λ.

    Args:
        features: Features `(samples, …)`, a tensor, an array or nested lists; all axes but the first are one sample's
            numbers.
        method: `two_nn` or `participation_ratio`.

    Returns:
        The dimension, at least 0. 0 if all samples are equal.

    Raises:
        ValueError: If features are no real numbers `(samples, …)`, there are fewer than 3 samples, a number is not
            finite, or the method is unknown. For `two_nn` also if most samples have a double, or two neighbours at the
            same distance, so that distances tell nothing.

    Source: Facco et al. 2017 (doi 10.1038/s41598-017-11873-y), by linear fit; Gao et al. 2017 (doi 10.1101/214262).
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; possible are {', '.join(METHODS)}.")
    given = _as_tensor(features)
    if given.ndim < 2 or given.is_complex():
        raise ValueError(
            f"features have shape {tuple(given.shape)} and are {given.dtype}; expected real numbers (samples, …) with "
            "two or more axes: give one feature per sample as (samples, 1), and complex numbers as two features."
        )
    if len(given) < 3:
        raise ValueError(f"features have {len(given)} samples, shape {tuple(given.shape)}; at least 3 are needed.")
    points = given.reshape(len(given), -1).double().cpu()
    if not points.isfinite().all():
        raise ValueError("features hold numbers that are not finite: leave out these samples.")
    points = points - points.mean(0)
    if not points.any():
        return 0.0
    return _two_nn(points) if method == "two_nn" else _participation_ratio(points)


def _as_tensor(features: Tensor | ArrayLike) -> Tensor:
    try:
        return features if isinstance(features, Tensor) else torch.as_tensor(np.asarray(features))
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, text
        raise ValueError(
            f"features ({type(features).__name__}) are no array of numbers ({error}); expected (samples, …) with "
            "equally many numbers for each sample."
        ) from error


def _participation_ratio(points: Tensor) -> float:
    wide = points.shape[1] > points.shape[0]
    gram = points @ points.T if wide else points.T @ points
    return float(gram.trace() ** 2 / gram.square().sum())


def _two_nn(points: Tensor) -> float:
    """Fit the slope of −log(1 − F) over log μ through 0, μ the ratio of the two distances and F its distribution."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    nearest = distances.topk(2, dim=1, largest=False).values
    ratios = (nearest[:, 1] / nearest[:, 0])[nearest[:, 0] > 0].log().sort().values
    if 2 * len(ratios) < len(points):
        raise ValueError(
            f"{len(points) - len(ratios)} of {len(points)} samples have a double, so distances tell nothing: leave "
            "out doubles, or use method='participation_ratio'."
        )
    if 2 * int((ratios < TIED).sum()) > len(ratios):
        raise ValueError(
            f"most of the {len(points)} samples have two nearest neighbours at the same distance, as evenly spaced "
            "points do, so distances tell nothing: use method='participation_ratio'."
        )
    kept = max(2, int(len(ratios) * (1 - DISCARDED)))
    heights = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / len(ratios))
    return float((ratios[:kept] * heights).sum() / ratios[:kept].square().sum())
