"""The paper's formulation of guidance, written from its description: a cost that this package must stay below.

Each step runs the target twice, once for its activations and once for the task loss. Hooks keep all activations of
both networks. Every pair of layers takes three HSICs, and each HSIC centres two Gram matrices by products with
`H = I − 11ᵀ/n`. That makes six Gram matrices and twelve n × n products per pair, and pairs share nothing. Without
padding, the value equals that of `GuidanceLoss` with linear CKA on the sequence axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_guidance.config import GuidanceConfig
from hf_guidance.features.batch import Batch
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.forward import forward_arguments, guide_batch, without_guide
from hf_guidance.mapping import Pair, pair_layers, pair_weight, parse_pair


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Compute the biased HSIC `tr(KHLH) / (n − 1)²` of linear kernels.

    Args:
        x: Features, `(n, d_x)`.
        y: Features, `(n, d_y)`.
    """
    n = len(x)
    h = torch.eye(n, dtype=x.dtype, device=x.device) - 1 / n
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return ((h @ k @ h) * (h @ l @ h)).sum() / (n - 1) ** 2


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Compute linear CKA, `HSIC(x, y) / √(HSIC(x, x) HSIC(y, y))`."""
    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


class PaperTrainer(Trainer):
    """A Trainer with the paper's loss: task loss plus the sum over the pairs of (1 − CKA).

    Args:
        guide: The frozen network.
        guidance: Layers to compare, the weights of the pairs, and that of the sum. Measure and sample axis are ignored:
            the measure is linear CKA with one sample per row.
        *args, **kwargs: Arguments of the Trainer.

    Source: Subramaniam et al., NeurIPS 2025 (arXiv 2410.20035), and its released code.
    """

    def __init__(self, *args: Any, guide: nn.Module, guidance: GuidanceConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guide, self.guidance = guide.to(self.args.device), guidance
        self._weights = {parse_pair(text): pair_weight(text) for text in guidance.layer_pairs or []}
        self._explicit = list(self._weights)
        ours = list(dict.fromkeys(target for target, _ in self._explicit)) or guidance.target_layers
        theirs = list(dict.fromkeys(name for _, name in self._explicit)) or guidance.guide_layers
        self._target_reader = LayerReader(self.accelerator.unwrap_model(self.model), ours, "target")
        self._guide_reader = LayerReader(guide, theirs, "guide")

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        guidance = self.paper_loss(model, inputs) if model.training else 0.0
        found = super().compute_loss(model, without_guide(inputs), *args, **kwargs)
        weighted = self.guidance.guidance_weight * guidance
        return (found[0] + weighted, *found[1:]) if isinstance(found, tuple) else found + weighted

    def paper_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Compute the weighted sum over the pairs of (1 − CKA), with a separate forward of each network."""
        with torch.no_grad(), self.accelerator.autocast(), self._guide_reader.reading(_keep) as theirs:
            positional, named = forward_arguments(self.guide, guide_batch(inputs, model, self.guide))
            self.guide(*positional, **named)
        with self._target_reader.reading(_keep) as ours:
            model(**without_guide(inputs))
        losses = {(t, g): 1 - cka(_rows(ours[t]), _rows(theirs[g])) for t, g in self._pairs()}
        return torch.stack([self._weights.get(pair, 1.0) * loss for pair, loss in losses.items()]).sum()

    def _pairs(self) -> list[Pair]:
        names = self._target_reader.names(), self._guide_reader.names()
        return self._explicit or pair_layers(*names, self.guidance.layer_mapping)


def _keep(name: str, activations: Tensor) -> Tensor:
    return activations


def _rows(activations: Tensor) -> Tensor:
    return activations.flatten(1).to(torch.promote_types(activations.dtype, torch.float32))
