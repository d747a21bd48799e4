"""Dimension of what a layer shows of its samples: intrinsic, or how many directions share the variance."""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("two_nn", "participation_ratio")
DISCARDED = 0.1  # share of the samples with the largest ratios, which noise and borders make too large


@torch.no_grad()
def intrinsic_dimension(features: Tensor, method: str = "two_nn") -> float:
    """Estimate the dimension of the set that a layer's features lie on.

    `two_nn` needs nothing but each sample's distances to its two nearest neighbours, and follows curved sets. It is too
    low where samples are few for the dimension: at 1000 samples from about 20 on. `participation_ratio` is the number
    of directions that share the variance, (Σ λ)² / Σ λ² of the covariance's eigenvalues λ.

    Args:
        features: Features `(samples, …)`; all axes but the first are one sample's numbers.
        method: `two_nn` or `participation_ratio`.

    Returns:
        The dimension, at least 0. 0 if all samples are equal.

    Raises:
        ValueError: If there are fewer than 3 samples, a number is not finite, or the method is unknown. For `two_nn`
            also if most samples have a double, so that distances tell nothing.

    Source: Facco et al. 2017 (doi 10.1038/s41598-017-11873-y), by linear fit; Gao et al. 2017 (doi 10.1101/214262).
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; possible are {', '.join(METHODS)}.")
    points = features.reshape(len(features), -1).double().cpu()
    if len(points) < 3:
        raise ValueError(f"features have {len(points)} samples, shape {tuple(features.shape)}; at least 3 are needed.")
    if not points.isfinite().all():
        raise ValueError("features hold numbers that are not finite: leave out these samples.")
    points = points - points.mean(0)
    if not points.any():
        return 0.0
    return _two_nn(points) if method == "two_nn" else _participation_ratio(points)


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
    kept = max(2, int(len(ratios) * (1 - DISCARDED)))
    heights = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / len(ratios))
    return float((ratios[:kept] * heights).sum() / ratios[:kept].square().sum())
