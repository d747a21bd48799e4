"""What comes of watching one forward of the target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_guidance.schedule import Weights


@dataclass
class Watched:
    """What came of one watched forward.

    Attributes:
        inputs: what the target is to be run on: the batch, or noise while pre-aligning on it.
        loss: Σ or mean over the pairs of (1 − similarity), a scalar; None if the batch had too few samples, or
            LayerDrop skipped the target layers of all pairs. With
            `similarity_batch="global"` its gradient is for a wrapper that averages gradients over the ranks.
        similarities: measure → pair → similarity, detached; the measure trained on comes first.
        weights: of guidance and task at this step.
        why_unguided: where there is no loss though guidance has a weight: the reason and the way out, in words.
        skipped_pairs: how many pairs are left out because LayerDrop skipped their target layer.
    """

    inputs: dict[str, Any]
    weights: Weights
    loss: Tensor | None = None
    similarities: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    why_unguided: str = ""
    skipped_pairs: int = 0

    def total(self, task_loss: Tensor) -> Tensor:
        """The loss to train on: the two terms, each with its weight at this step."""
        total = task_loss if self.weights.task == 1 else self.weights.task * task_loss
        return total if self.loss is None else total + self.weights.guidance * self.loss.to(total.device)
