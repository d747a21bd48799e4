"""Gradients through layers that are read: whether they reach a weight."""

from __future__ import annotations

from torch import Tensor, nn


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
