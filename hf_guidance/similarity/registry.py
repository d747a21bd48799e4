"""Registry of measures: each in two stages for the guidance loss, work done once per layer and work per pair."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_guidance.similarity.cosines import Cosine, off_diagonal_cosines, rbf
from hf_guidance.similarity.layers import PRIMAL_BELOW, layer_of
from hf_guidance.similarity.own import Own, find_function, is_own
from hf_guidance.similarity.pair_loss import Method, compare_pairs, with_slopes
from hf_guidance.similarity.regression import Ridge
from hf_guidance.similarity.rotation import Rotation

RIDGE_BELOW = 0.8  # largest d / n at which a target layer stays features for ridge, whose dual form inverts n × n
ALL_INVARIANCES = frozenset({"orthogonal", "isotropic_scaling", "translation", "permutation"})


@dataclass(frozen=True)
class Measure:
    """Similarity of two layers, as the guidance loss and its public function compute it.

    Args:
        name: Name of the public function.
        min_samples: Smallest number of samples for which the value is not a constant.
        method: How it is computed.
        primal_below: Largest d / n at which a target layer stays features instead of becoming a Gram matrix.
        guide_below: The same for a guide layer.
        takes_sketch: Whether the value of sketched layers estimates that of the layers.
        invariant_to: Transformations of either representation that do not change the value.
    """

    name: str
    min_samples: int
    method: Method[Any]
    primal_below: float = PRIMAL_BELOW
    guide_below: float = PRIMAL_BELOW
    takes_sketch: bool = False
    invariant_to: frozenset[str] = ALL_INVARIANCES

    def __call__(self, features_target: Tensor, features_guide: Tensor) -> Tensor:
        if not (isinstance(features_target, Tensor) and isinstance(features_guide, Tensor)):
            got = f"{type(features_target).__name__} and {type(features_guide).__name__}"
            raise ValueError(f"{self.name}: got {got}; expected two tensors (n, d) of the same n samples.")
        if features_target.ndim < 2 or features_guide.ndim < 2:
            got = f"shapes {tuple(features_target.shape)} and {tuple(features_guide.shape)}"
            raise ValueError(f"{self.name}: got features of {got}; expected (n, d) for both.")
        n_target, n_guide = features_target.shape[0], features_guide.shape[0]
        if n_target != n_guide or n_target < self.min_samples:
            raise ValueError(
                f"{self.name}: got {n_target} target samples and {n_guide} guide samples; "
                f"both must describe the same samples, at least {self.min_samples} of them."
            )
        sides = [features_target, features_guide]
        if torch.float64 in (features_target.dtype, features_guide.dtype):
            sides = [side.double() for side in sides]
        limits = self.primal_below, self.guide_below
        target, guide = ({"": layer_of(x, primal_below=limit)} for x, limit in zip(sides, limits, strict=True))
        values, slopes = compare_pairs([("", "")], self, target, guide)
        return with_slopes(values[0], target, slopes)


def _ridge(name: str, penalty: float) -> Measure:
    return Measure(name, 3, Ridge(penalty, leave_one_out=name == "ridge_loo"), RIDGE_BELOW, guide_below=1)


def _own(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    return Measure(name, 2, Own(name, function), math.inf, math.inf, invariant_to=frozenset())


PENALTIES = {"ridge": 0.1, "ridge_loo": 1.0}  # λ over the mean squared norm of the target's samples
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("linear_cka", 3, Cosine(), takes_sketch=True),
        Measure("debiased_cka", 4, Cosine(debiased=True), takes_sketch=True),
        Measure("rbf_cka", 3, Cosine(kernel=rbf), primal_below=0, guide_below=0),
        Measure("rsa", 3, Cosine(kernel=off_diagonal_cosines), primal_below=0, guide_below=0),
        *(_ridge(name, penalty) for name, penalty in PENALTIES.items()),
        Measure("procrustes", 3, Rotation(), primal_below=1, guide_below=1),
    )
}
REGISTERED: dict[str, Measure] = {}  # measures that the user has registered


def register_measure(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make a measure of your own known under a name, for `GuidanceConfig(measure=name)`.

    It is slower than the others: all layers stay features, and autograd computes the gradient.

    Args:
        name: An identifier that is no name of a measure here.
        function: (target features `(n, d_target)`, guide features `(n, d_guide)`) → similarity, a scalar,
            differentiable in the first. The features are centred and scaled to a mean squared norm of 1. With a mask
            on the sequence axis they are 0 at padding, and have one more column for each position.

    Raises:
        ValueError: If the name is taken or no identifier, or the function is not callable.

    Example:
        >>> register_measure("dot", lambda x, y: (x @ x.T * (y @ y.T)).mean())
    """
    if name in MEASURES or name == "auto" or not str(name).isidentifier():
        raise ValueError(f"register_measure: {name!r} must be an identifier other than auto, {', '.join(MEASURES)}.")
    if not callable(function):
        raise ValueError(
            f"register_measure: got {type(function).__name__} for {name!r}, expected a function of two matrices."
        )
    REGISTERED[name] = _own(name, function)


def check_measure(name: str) -> None:
    """Check that a measure is known, or names a function of the user's own, which is not imported.

    Raises:
        ValueError: If the name is unknown. The message lists the known ones.
    """
    if name not in MEASURES and name not in REGISTERED and not is_own(name):
        known = [*MEASURES, *REGISTERED]
        spelt = name.lower().replace("-", "_")
        close = [k for k in known if spelt in k.split("_")] or difflib.get_close_matches(spelt, known, n=1)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"Unknown measure {name!r}; possible are {', '.join(known)}, those of register_measure, and "
            "'module:function' for one of your own."
            f"{hint}"
        )


def get_measure(name: str, penalty: float | None = None) -> Measure:
    """Return the measure of a name. One of the form `module:function` is imported.

    Args:
        name: Name of a measure.
        penalty: Penalty λ of `ridge` and `ridge_loo`, relative to the mean squared norm of the target's samples; None
            for their own.

    Raises:
        ValueError: If the name is unknown, or the function cannot be imported.
    """
    check_measure(name)
    if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
        raise ValueError(f"penalty is {penalty}; it must be a finite number above 0.")
    if name in PENALTIES and penalty is not None:
        return _ridge(name, penalty)
    if is_own(name):
        return _own(name, find_function(name))
    return MEASURES[name] if name in MEASURES else REGISTERED[name]


def check_takes_sketch(measure: Measure) -> None:
    """Raise ValueError if the value of sketched layers is not that of the layers. The message names others."""
    if not measure.takes_sketch:
        possible = ", ".join(entry.name for entry in MEASURES.values() if entry.takes_sketch)
        raise ValueError(
            f"{measure.name} takes no sketch, as its value of sketched layers is not that of the layers: use one of "
            f"{possible} in measure and log_measures, or leave sketch out."
        )


def primal_below_of(measures: Sequence[Measure], of_guide: bool = False) -> float:
    """Return the largest d / n at which layers stay features, for measures of which the first is trained on."""
    needs_features = any(math.isinf(measure.primal_below) for measure in measures)
    return math.inf if needs_features else measures[0].guide_below if of_guide else measures[0].primal_below


def min_samples(name: str) -> int:
    """Return the fewest samples that a measure takes, without importing one of the user's own."""
    return 2 if is_own(name) else get_measure(name).min_samples
