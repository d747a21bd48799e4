"""Features of a network: what its layers show of a batch in one forward, and which samples they show.

`reader` hooks hidden states and named modules, `layer_drop` knows which layers ran, `samples` says what one sample is
and leaves padding out, and `distributed` makes one batch of those of all processes.
"""

from hf_guidance.features.distributed import Ranks
from hf_guidance.features.reader import (
    HIDDEN,
    STARTS_WITH_A_LAYER,
    AllRead,
    LayerReader,
    Reduce,
    base_model_of,
    describe_modules,
    find_modules,
    first_tensor,
    not_recomputed,
)
from hf_guidance.features.samples import Samples

__all__ = [
    "HIDDEN",
    "STARTS_WITH_A_LAYER",
    "AllRead",
    "LayerReader",
    "Ranks",
    "Reduce",
    "Samples",
    "base_model_of",
    "describe_modules",
    "find_modules",
    "first_tensor",
    "not_recomputed",
]
