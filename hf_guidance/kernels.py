"""Gram matrices: what a layer is, once its n samples have been compared with each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ROUNDINGS = 16  # Gram entries below so many roundings of their mean diagonal carry no signal
# Centring the Gram matrix instead of the features spares a pass over them, and multiplies its rounding by the energy of
# the mean relative to that of the signal: up to here that stays about 1e-6 of a similarity, and below 1e-4 of its
# gradient. A gradient in these features is a slope's product with them, mean and all, hence less of it there.
SAFE_OFFSET = 12
SAFE_WITH_GRADIENT = 4
LARGEST_OFFSET = 1000  # beyond, a layer may be dead, and the mean's own rounding counts
PROBED = 1024  # features of a wide layer that tell which of the two ways will do
BLOCK = 4096  # features that are centred at a time, so that they stay in the cache
EXPECTED = "gradient_is_centred"


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
    """Subtract row and column means of a symmetric matrix: ``H K H`` with ``H = I − 11ᵀ/n``."""
    mean = kernel.mean(0)
    return kernel - mean[:, None] - (mean - mean.mean())[None, :]


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
    return kernel * inverse_norms([kernel])[0]


def inverse_norms(kernels: Sequence[Tensor]) -> Tensor:
    """One over the Frobenius norm of each; 0 for a matrix that is zero up to rounding."""
    norms = torch.stack([torch.linalg.vector_norm(kernel) for kernel in kernels])
    zero = norms <= ROUNDINGS * torch.finfo(norms.dtype).eps * len(kernels[0])
    return torch.where(zero, torch.inf, norms).reciprocal()


def gram(
    features: Tensor,
    mask: Tensor | None = None,
    *,
    sketch: Callable[[Tensor], Tensor] | None = None,
    precision: torch.dtype | None = None,
    keep_copy: bool = False,
) -> Tensor:
    """Gram matrix of the centred features, scaled to a mean diagonal of 1; zero for a dead layer.

    Args:
        features: ``(n, …)``; everything after the sample axis is one feature axis.
        mask: ``(n, length)``, true where valid, for features ``(n, length, …)``. A column's mean is then taken over its
            valid entries and the invalid ones are set to it; what such a mean takes from the product of two samples on
            average is given back, so that padding carries no signal of its own.
        sketch: applied to the masked, centred features ``(n, d)``; without a mask, sketch them before.
        precision: what the features were computed in, if they are in another now.
        keep_copy: for features that are overwritten in place before the backward, as a module's output may be.

    Returns:
        ``(n, n)`` in float32 (float64 for float64 features). The scale is a constant for the gradient, which is exact
        all the same for every measure here: none depends on it.
    """
    if features.ndim < 2 or (mask is not None and features.shape[:2] != mask.shape):
        expected = "(n, d)" if mask is None else f"({mask.shape[0]}, {mask.shape[1]}, …), as the mask has it"
        raise ValueError(f"gram: features have shape {tuple(features.shape)}, expected {expected}.")
    precision = precision or features.dtype
    x = features if features.dtype == torch.float64 else features.float()
    if mask is None:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return _scaled_kernel(flat(x.detach()), precision)[0]
        return CentredKernel.apply(flat(x), precision, keep_copy and x is features)
    with exact_float32(features.device):
        kernel, offset = _masked_kernel(x, mask.bool(), precision, sketch or (lambda centred: centred))
        kernel = center(kernel)  # also removes what rounding of the mean left behind
        return kernel / _scale(kernel.diagonal().mean().detach(), offset.detach(), precision)


def _scale(energy: Tensor, offset: Tensor, precision: torch.dtype) -> Tensor:
    """The mean diagonal, that a Gram matrix is divided by; infinite for a dead layer, whose spread is rounding."""
    dead = energy <= (2 * torch.finfo(precision).eps) ** 2 * offset  # false for NaN, which must come through
    return torch.where(dead, torch.inf, energy)


def flat(x: Tensor) -> Tensor:
    """``(n, …)`` as ``(n, d)``, the features in whichever order they lie in memory, so that nothing is copied."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


class CentredKernel(torch.autograd.Function):
    """The Gram matrix ``x̃ x̃ᵀ / scale`` of features ``(n, d)`` without a mask.

    The gradient is one product, ``(G + Gᵀ) x̃``, where autograd makes two and goes through the centring as well; with
    ``G`` centred it is as good with ``x`` in place of ``x̃``. A ``G`` that is known to be symmetric and centred
    (`expect_centred`) is taken as it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, precision: torch.dtype, keep_copy: bool) -> Tensor:
        kernel, ctx.factor, kept = _scaled_kernel(x, precision, keep=True)
        ctx.has_mean = kept is x
        ctx.save_for_backward(kept.clone() if keep_copy and kept is x else kept)
        return kernel

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if getattr(ctx, EXPECTED, False):
            factor = 2 * ctx.factor
            gradient = center(gradient) if ctx.has_mean else gradient  # of its rounding, which the mean would multiply
        else:
            gradient, factor = _center_in_place(gradient + gradient.T), ctx.factor
        plain = on_cpu(x) and not torch.is_autocast_enabled("cpu")  # where there is nothing to switch off
        with nullcontext() if plain else exact_float32(x.device):
            if isinstance(factor, float):
                return torch.addmm(x.new_empty(()), gradient, x, beta=0, alpha=factor), None, None
            return (gradient * factor) @ x, None, None


def expect_centred(kernel: Tensor) -> None:
    """Say of a result of `gram` that the gradient of all its uses is symmetric and centred: it is taken as it is."""
    if isinstance(kernel.grad_fn, CentredKernel._backward_cls):
        setattr(kernel.grad_fn, EXPECTED, True)


def _scaled_kernel(x: Tensor, precision: torch.dtype, keep: bool = False) -> tuple[Tensor, float | Tensor, Tensor]:
    """``x̃ x̃ᵀ / scale``, and, to `keep` for the backward, the number and the features of which the gradient is made."""
    if x.dtype == torch.float32 and on_cpu(x) and (found := _kernel_on_host(x, keep)):
        return found
    with exact_float32(x.device):
        mean = x.mean(0)
        centred = x - mean
        kernel = _center_in_place(outer(centred))  # again, for what rounding of the mean left behind
        offset = _varying(mean, centred, precision).square().sum()
        inverse = _scale(kernel.diagonal().mean(), offset, precision).reciprocal()
        return kernel.mul_(inverse), inverse, centred


def _kernel_on_host(x: Tensor, keep: bool) -> tuple[Tensor, float, Tensor] | None:
    """The same with the fewest passes; None where the mean of the features is too large for that.

    In numpy's plainest calls, which cost a tenth of torch's; that counts where a step has dozens of small matrices.
    """
    array = x.numpy()
    n, width = array.shape
    if n < 2:
        return None
    if width <= n:  # then the features are the smaller matrix
        if (found := _features_on_host(array)) is None:
            return None
        centred, inverse = found
        return torch.from_numpy(centred @ centred.T), inverse, torch.from_numpy(centred)
    safe = SAFE_WITH_GRADIENT if keep else SAFE_OFFSET
    if width < 4 * PROBED or _offset_of(array[:, :PROBED]) <= safe:
        kernel = array @ array.T
        energy, offset = _centre_on_host(kernel)
        if 0 < energy < math.inf and offset <= safe * energy:
            kernel *= 1 / energy
            return torch.from_numpy(kernel), 1 / energy, x
    mean = np.add.reduce(array, 0) / n
    if keep:
        array = array - mean
        kernel = array @ array.T
    else:
        kernel = _kernel_in_blocks(array, mean)
    energy, _ = _centre_on_host(kernel)  # again, for what rounding of the mean left behind
    if not (0 < energy < math.inf and float(np.vdot(mean, mean)) <= LARGEST_OFFSET * energy):
        return None
    kernel *= 1 / energy
    return torch.from_numpy(kernel), 1 / energy, torch.from_numpy(array)


def _offset_of(array: Any) -> float:
    """The energy of the features' mean relative to that of the signal."""
    mean = np.add.reduce(array, 0) / len(array)
    offset = float(np.vdot(mean, mean))
    energy = float(np.einsum("ij,ij->", array, array)) / len(array) - offset
    return offset / energy if energy > 0 else math.inf


def _centre_on_host(kernel: Any) -> tuple[float, float]:
    """Centre a Gram matrix in place; its mean diagonal afterwards, and what that was more before."""
    mean = np.add.reduce(kernel, 0) / len(kernel)
    offset = float(np.add.reduce(mean)) / len(kernel)
    energy = float(kernel.trace()) / len(kernel) - offset
    kernel -= mean[:, None]
    kernel -= mean - np.float32(offset)
    return energy, offset


def _kernel_in_blocks(array: Any, mean: Any) -> Any:
    """Gram matrix of the features less their mean, of which there is never more than a block."""
    kernel: Any = 0
    room = np.empty((len(array), min(BLOCK, len(mean))), array.dtype)
    for start in range(0, len(mean), BLOCK):
        block = array[:, start : start + BLOCK]
        centred = np.subtract(block, mean[start : start + BLOCK], out=room[:, : block.shape[1]])
        kernel += centred @ centred.T
    return kernel


def centred_features(x: Tensor, precision: torch.dtype) -> tuple[Tensor, float | Tensor]:
    """Centred features ``(n, d)``, scaled so that the mean diagonal of their Gram matrix is 1, and the scale."""
    if x.dtype == torch.float32 and on_cpu(x) and (found := _features_on_host(x.numpy())):
        return torch.from_numpy(found[0]), found[1]
    mean = x.mean(0)
    centred = x - mean
    centred -= centred.mean(0)  # what rounding of the mean left behind
    offset = _varying(mean, centred, precision).square().sum()
    inverse = _scale(centred.square().sum() / len(x), offset, precision).rsqrt()
    return centred * inverse, inverse


def _features_on_host(array: Any) -> tuple[Any, float] | None:
    """The same in few passes; None where the mean of the features is too large for that."""
    mean = np.add.reduce(array, 0) / len(array)
    centred = array - mean
    energy, offset = float(np.vdot(centred, centred)) / len(array), float(np.vdot(mean, mean))
    if not (0 < energy < math.inf and offset <= SAFE_OFFSET * energy):
        return None
    centred *= energy**-0.5
    return centred, energy**-0.5


def _center_in_place(kernel: Tensor) -> Tensor:
    mean = kernel.mean(0)
    return kernel.sub_(mean[:, None]).sub_(mean - mean.mean())


def outer(x: Tensor) -> Tensor:
    """``x xᵀ``; on a CPU by numpy, which knows that half of it is enough."""
    if not on_cpu(x):
        return x @ x.T
    array = x.numpy()
    return torch.from_numpy(array @ array.T)


def on_cpu(x: Tensor) -> bool:
    """Whether numpy may do it: not where torch is to see what is done, to compile it or to count it."""
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return x.device.type == "cpu" and not watched


def _varying(mean: Tensor, centred: Tensor, precision: torch.dtype) -> Tensor:
    """The mean, without features that are one constant: they hold no rounding, which matters at 8 to 11 bits."""
    coarse = torch.finfo(precision).bits < 32
    return torch.where((centred != 0).any(0), mean, 0) if coarse else mean


def _masked_kernel(
    x: Tensor, valid: Tensor, precision: torch.dtype, sketch: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The same over the valid entries, and the mean over the samples of what was subtracted from them."""
    x = x.reshape(*valid.shape, -1)
    m = valid.sum(0).to(x)  # (length,)
    mean = torch.where(valid[..., None], x, 0).sum(0) / m.clamp(min=1)[:, None]
    centred = torch.where(valid[..., None], x - mean, 0)
    # independent samples have E⟨x̃_i, x̃_j⟩ = −E[spread] / (m (m − 1)) at each position, for the mean is theirs; not 0
    lost = centred.square().sum((0, 2)) / (m * (m - 1)).clamp(min=1)
    flattened = sketch(centred.flatten(1))
    kernel = flattened @ flattened.T + (valid * lost) @ valid.to(x).T
    return kernel, (_varying(mean, centred, precision).square().sum(1) * m).sum() / len(x)
