"""CKA of many layers over a stream of batches: sums of HSIC, whose size does not depend on the number of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer
from hf_guidance.similarity.matrices import u_center

FEWEST = 4  # samples of a batch, below which HSIC has no estimate without bias
REPLICATES = 100  # of the bootstrap
FEWEST_BATCHES = 8  # below which a bootstrap over batches says nothing


class HSICSums:
    """Sums over batches from which the CKA of every pair of layers follows.

    HSIC is estimated on each batch without bias, of features that are not scaled, and weighted by the number of
    samples; the mean is divided only once. Tokens of one row are alike, and a batch has a larger share of them than all
    data have: only tokens of different rows are taken together. So neither value depends on how the samples are
    batched, except for noise.
    Linear CKA is that of all samples together: what the biased estimate adds to HSIC is computed from its two other
    parts, the variances and the products of squared norms.

    Args:
        seed: Seed of the bootstrap over batches.

    Attributes:
        batches: Number of batches; with rows that are compared by themselves, of rows.
        samples: Number of samples.

    Sources: Song et al. 2012, JMLR 13 (HSIC without bias); Nguyen et al. 2021, arXiv 2010.15327 (its mean over
    batches).
    """

    def __init__(self, seed: int = 0) -> None:
        self.batches, self.samples = 0, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._weights = torch.zeros(1 + REPLICATES, dtype=torch.float64)
        self._sums: dict[str, Tensor] = {}

    def add(self, layers_a: Sequence[Layer], layers_b: Sequence[Layer], row_of: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            layers_a: Layers of one network, in dual form.
            layers_b: Those of the other on the same samples, in dual form.
            row_of: Row that each sample comes from, `(n,)`, of at least 4 rows; None if each has its own.
        """
        n = layers_a[0].samples
        grams_a, grams_b = (torch.stack([_unscaled(layer) for layer in side]) for side in (layers_a, layers_b))
        if row_of is None:
            u_a, u_b = (u_center(grams).flatten(2) / (n * (n - 3)) ** 0.5 for grams in (grams_a, grams_b))
            factors = u_a.new_ones(())
        else:
            between = Between(row_of.to(grams_a.device))
            u_a, u_b, factors = between.sums(grams_a), between.sums(grams_b), between.factors
        norms_a, norms_b = (grams.diagonal(dim1=-2, dim2=-1) * (n / (n - 1)) for grams in (grams_a, grams_b))
        of_batch = {
            "ab": torch.einsum("ark,brk->rab", u_a * factors, u_b),
            "aa": (u_a.square() * factors).sum(-1).T,
            "bb": (u_b.square() * factors).sum(-1).T,
            "norms ab": torch.einsum("ark,brk->rab", norms_a, norms_b) / n,
            "norms aa": norms_a.square().mean(-1).T,
            "norms bb": norms_b.square().mean(-1).T,
            "variance a": norms_a.mean(-1).T,
            "variance b": norms_b.mean(-1).T,
        }
        rows = grams_a.shape[1]
        weights = torch.poisson(torch.ones(rows, REPLICATES), generator=self._generator).double()
        weights = n * torch.cat([torch.ones(rows, 1, dtype=torch.float64), weights], 1)
        self._weights += weights.sum(0)
        for name, values in of_batch.items():
            summed = torch.tensordot(weights, values.cpu(), dims=([0], [0]))
            self._sums[name] = self._sums[name] + summed if name in self._sums else summed
        self.batches += rows
        self.samples += n * rows

    def debiased(self) -> tuple[Tensor, Tensor | None]:
        """Compute debiased CKA.

        Returns:
            `(layers of a, layers of b)`, and its standard error over batches, or None for fewer than eight. NaN where a
            layer is constant.
        """
        mean = self._means()
        return self._cka(mean["ab"], mean["aa"], mean["bb"])

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """Compute linear CKA of all samples together, as `debiased` does."""
        mean, n = self._means(), self.samples

        def whole(of: str, variance: str, other: str) -> Tensor:
            """Return the squared norm of the product of both centred features, over n²."""
            left, right = mean[f"variance {variance}"], mean[f"variance {other}"]
            traces = left[:, :, None] * right[:, None, :] if variance != other else left * right
            norms = mean[f"norms {of}"] * ((n - 1) / n) ** 2
            return (n - 3) / n * mean[of] + norms / (n - 2) - traces * (n - 1) / (n - 2) / n**2

        return self._cka(whole("ab", "a", "b"), whole("aa", "a", "a"), whole("bb", "b", "b"))

    def _means(self) -> dict[str, Tensor]:
        weights = self._weights.clamp(min=1)
        return {name: summed / weights.view(-1, *[1] * (summed.ndim - 1)) for name, summed in self._sums.items()}

    def _cka(self, ab: Tensor, aa: Tensor, bb: Tensor) -> tuple[Tensor, Tensor | None]:
        known = (aa > 0)[:, :, None] & (bb > 0)[:, None, :]
        values = torch.where(known, ab / (aa[:, :, None] * bb[:, None, :]).clamp(min=0).sqrt(), torch.nan)
        return values[0], values[1:].std(0) if self.batches >= FEWEST_BATCHES else None


class Between:
    """HSIC without bias of samples that come in rows, from tuples of samples of different rows.

    It is E[k₁₂ l₁₂] + E[k₁₂] E[l₃₄] − 2 E[k₁₂ l₁₃]. Each mean follows from sums of a Gram matrix over samples and rows,
    less the tuples in which a row comes twice.

    Args:
        row_of: Row that each sample comes from, `(n,)`.

    Attributes:
        factors: Factors of the products of two matrices' sums, whose sum is HSIC.
    """

    def __init__(self, row_of: Tensor) -> None:
        self.same = row_of[:, None] == row_of
        self._rows = torch.nn.functional.one_hot(row_of.unique(return_inverse=True)[1]).double()
        everywhere = self._parts(torch.ones_like(self.same, dtype=torch.float64))
        tuples = [float(part.square().sum()) for part in everywhere]
        two, three = tuples[0], tuples[1] - tuples[2]
        four = tuples[3] - 4 * tuples[4] + 2 * tuples[5]
        of_parts = [1 / two, -2 / three, 2 / three, 1 / four, -4 / four, 2 / four]
        self.factors = torch.cat(
            [torch.full_like(part, factor) for part, factor in zip(everywhere, of_parts, strict=True)]
        )

    def sums(self, grams: Tensor) -> Tensor:
        """Return all sums of Gram matrices `(…, n, n)`, side by side."""
        return torch.cat(self._parts(grams), -1)

    def _parts(self, grams: Tensor) -> list[Tensor]:
        grams = grams.masked_fill(self.same, 0)
        to_rows = grams @ self._rows
        of_rows = self._rows.T @ to_rows
        totals = of_rows.sum((-2, -1))[..., None]
        return [grams.flatten(-2), grams.sum(-1), to_rows.flatten(-2), totals, of_rows.sum(-1), of_rows.flatten(-2)]


def _unscaled(layer: Layer) -> Tensor:
    """Return the Gram matrix of a layer's centred features, `(rows, n, n)` in float64."""
    factor = torch.as_tensor(layer.factor, dtype=torch.float64, device=layer.values.device)
    return layer.values.double().view(layer.rows, layer.samples, layer.samples) / torch.where(factor > 0, factor, 1.0)
