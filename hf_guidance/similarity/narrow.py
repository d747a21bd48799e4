"""Linear CKA of layers with few features, without their n × n Gram matrices.

Centred features F and H have `K = F Fᵀ` and `L = H Hᵀ`, so `⟨K, L⟩ = ‖Hᵀ F‖²` and `‖K‖ = ‖Fᵀ F‖`. These take d × d
matrices instead of n × n ones. The value and the gradient are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_guidance.mapping import Pair
from hf_guidance.similarity.grams import EXPECTED, Context, centred_features, exact_float32, without_second_derivative
from hf_guidance.similarity.matrices import ROUNDINGS, norms
from hf_guidance.similarity.numpy_products import for_numpy, one_thread

MOST = 0.4  # largest d / n at which 7 n d² operations for a pair are fewer than 3 n² d


def few(features: Tensor) -> bool:
    """Tell whether features `(n, d)` are cheaper to compare than their Gram matrix."""
    return features.shape[1] <= MOST * features.shape[0]


def is_thin(kernel: Tensor) -> bool:
    """Tell whether this holds features in place of a Gram matrix."""
    return kernel.shape[1] != kernel.shape[0]


class ThinContext(Context):
    """The context of a `Thin`."""

    stacked: bool
    factors: Any  # of each layer, or of all as one tensor


class Thin(torch.autograd.Function):
    """Centred features of layers of one shape `(n, d)`, whose Gram matrices are those of `gram`.

    The features of a dead layer are zero. As in `gram`, the gradient treats the scale as a constant.
    """

    @staticmethod
    def forward(ctx: ThinContext, precision: torch.dtype, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.stacked = len(features) > 1 and in_one_stack(features[0])
        if not ctx.stacked:
            made = [centred_features(x, precision) for x in features]
            ctx.factors = [factor for _, factor in made]
            return tuple(centred for centred, _ in made)
        centred, factors = centred_features(torch.stack(features), precision)
        ctx.factors = factors[:, None, None]
        return centred.unbind()

    @staticmethod
    @without_second_derivative
    def backward(ctx: ThinContext, *gradients: Tensor) -> tuple[Any, ...]:
        def of_features(gradient: Tensor, factor: float | Tensor) -> Tensor:
            expected = getattr(ctx, EXPECTED, False)
            return (gradient if expected else gradient - gradient.mean(-2, keepdim=True)) * factor

        if ctx.stacked:
            return None, *of_features(torch.stack(gradients), ctx.factors).unbind()
        return None, *map(of_features, gradients, ctx.factors)


def in_one_stack(features: Tensor) -> bool:
    """Tell whether to copy several layers into one tensor. On a CPU the cache holds one layer, not all."""
    return features.device.type != "cpu"


class _Outer(torch.autograd.Function):
    """Product `F Fᵀ`, whose gradient is one product."""

    @staticmethod
    def forward(ctx: Context, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return features @ features.T

    @staticmethod
    @without_second_derivative
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        with exact_float32(features.device):
            return (gradient + gradient.T) @ features


def whole(kernels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all as Gram matrices, for code that takes nothing else."""
    return {name: _Outer.apply(kernel) if is_thin(kernel) else kernel for name, kernel in kernels.items()}


@one_thread()
def cosines(
    pairs: Sequence[Pair], targets: Mapping[str, Tensor], guides: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Compute linear CKA of each pair of thin layers, and the slope of their sum in each target's features.

    The slope of a target is `2 Σ (H Hᵀ F / ‖L‖ − cosine · F Fᵀ F / ‖K‖) / ‖K‖` over its pairs.

    Args:
        pairs: (target layer, guide layer).
        targets: features `(n, d)` by layer.
        guides: features `(n, d)` by layer, of the same samples.

    Returns:
        The cosines, and for each target that needs a gradient its slope and the factor of the slope, 1.
    """
    like = next(iter(targets.values()))
    host = for_numpy(like)
    f, h = ({n: x.detach().numpy() if host else x.detach() for n, x in side.items()} for side in (targets, guides))
    tiny = ROUNDINGS * torch.finfo(like.dtype).eps * len(like)
    squares = {name: x.T @ x for name, x in f.items()}
    ours = {name: _inverse_norm(square, tiny) for name, square in squares.items()}
    theirs = {name: _inverse_norm(x.T @ x, tiny) for name, x in h.items()}
    found: list[Any] = []
    sums: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for t, g in pairs:
        cross = h[g].T @ f[t]
        cosine = (cross * cross).sum() * ours[t] * theirs[g]
        found.append(cosine)
        shares[t] = shares.get(t, 0) + cosine
        part = h[g] @ (cross * (2 * ours[t] * theirs[g]))
        sums[t] = sums[t] + part if t in sums else part
    wanted = [t for t, kernel in targets.items() if kernel.requires_grad and torch.is_grad_enabled()]
    slopes: dict[str, tuple[Tensor, Tensor]] = {}
    one = like.new_ones(())
    for t in wanted:
        slope = sums[t] - f[t] @ (squares[t] * (2 * shares[t] * ours[t] * ours[t]))
        slopes[t] = torch.from_numpy(slope) if host else slope, one
    return (like.new_tensor(found) if host else torch.stack(found)), slopes


def _inverse_norm(square: Any, tiny: float) -> Any:
    if isinstance(square, Tensor):
        norm = norms(square)
        return torch.where(norm <= tiny, 0, 1 / norm)
    size = float((square * square).sum()) ** 0.5
    return 0.0 if size <= tiny else 1 / size  # NaN stays NaN
