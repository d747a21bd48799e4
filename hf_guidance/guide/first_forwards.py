"""Checks of a guide on its first batch: whether it is random, and whether it tells packed documents apart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_guidance.features.batch import Batch, documents_of
from hf_guidance.features.reader import Reduce

logger = logging.getLogger(__name__)

Read = Callable[[Batch, Reduce], dict[str, Any]]
ALIKE = 0.02  # largest relative difference that rounding makes, in half precision too
SAME = 1e-3  # the same for two forwards of one batch


def check_is_not_random(guide: nn.Module, read: Read, inputs: Batch) -> None:
    """Raise ValueError for a guide whose features differ between two forwards of one batch.

    Args:
        guide: The guide.
        read: Runs it on a batch, and reduces each layer.
        inputs: Its columns of the batch.
    """
    once, again = (read(inputs, lambda _, features: features.clone()) for _ in range(2))
    for name, features in once.items():
        same = features.shape == again[name].shape
        difference = (features - again[name]).norm() / features.norm() if same else 1.0
        if difference > SAME:
            raise ValueError(
                f"the guide ({type(guide).__name__}) is random: two forwards of the same batch differ by "
                f"{100 * difference:.2g} % in layer {name}, so that the target would follow noise. Switch this off "
                "in the guide's config, or load the guide without it: of a masked autoencoder that is its plain "
                "encoder (the weights of ViTMAEModel in ViTModel)."
            )


def warn_if_documents_mix(guide: nn.Module, read: Read, inputs: Batch) -> None:
    """Warn if the guide's features of a packed document differ from those of the document alone.

    Args:
        guide, read, inputs: As of `check_is_not_random`.
    """
    documents = documents_of(inputs)
    columns = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim == 2}
    if len(documents) < 2 or "input_ids" not in columns:
        return
    place = documents[1]  # the first document has nothing before it
    alone = {name: columns[name][:, place] for name in columns.keys() & {"input_ids", "position_ids"}}
    together, apart = (read(batch, lambda _, output: output) for batch in (inputs, alone))
    for name, features in apart.items():
        packed = together[name][:, place]
        difference = (packed - features).norm() / features.norm()
        if not difference < ALIKE:
            logger.warning(
                "The guide (%s) does not tell packed documents apart: features of the second document differ by "
                "%.0f %% from those of the document alone (%s). Pad the rows instead of packing them, or use "
                "another guide.",
                type(guide).__name__,
                100 * difference,
                name,
            )
            return
