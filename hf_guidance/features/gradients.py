"""Gradients through layers that are read: under activation checkpointing, and whether they reach a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.features.reader import Reduce


def not_recomputed(reduce: Reduce) -> Reduce:
    """Hide `reduce` from activation checkpointing, whose second forward would not find the tensors saved in it.

    Reentrant checkpointing is refused. Its first forward has no gradients, so a layer inside would not be guided.
    """
    with_gradients = torch.is_grad_enabled()

    def reduce_unseen(name: str, features: Any) -> Any:
        if with_gradients and not torch.is_grad_enabled():
            raise ValueError(
                f"target layer {name!r} ran without gradients inside the target's forward, as under reentrant "
                "activation checkpointing: guidance could not reach it. Set use_reentrant=False, or name layers "
                "outside (hidden_states)."
            )
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            return reduce(name, features)

    return reduce_unseen


def reaches_weights(loss: Tensor) -> bool:
    """Tell whether the backward of a loss reaches a weight, not only an input with `requires_grad`."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # the graph inside reentrant checkpointing is hidden
        if isinstance(getattr(node, "variable", None), nn.Parameter) or "Checkpoint" in node.name():
            return True
        nodes += [before for before, _ in node.next_functions]
    return False
