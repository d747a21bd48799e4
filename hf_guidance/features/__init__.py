"""Features of a network: the outputs of its layers on a batch, and the samples they belong to.

Read `reader` first, which hooks hidden states and the modules that `modules` finds, then `rows`, which leaves padding
out, and `samples`, which defines one sample. `hidden_states`, `batch_first`, `layer_drop` and `conventions` know how
networks differ; `choices` picks rows, and `distributed` joins the batches of all processes.
"""

from hf_guidance.features.batch import Batch
from hf_guidance.features.distributed import Ranks
from hf_guidance.features.gradients import reaches_weights
from hf_guidance.features.hidden_states import first_tensor
from hf_guidance.features.inside import is_sentence_transformer, transformer_in
from hf_guidance.features.modules import describe_modules, find_modules
from hf_guidance.features.reader import (
    HIDDEN,
    AllRead,
    LayerReader,
    Reduce,
    base_model_of,
    not_recomputed,
)
from hf_guidance.features.rows import content_of
from hf_guidance.features.samples import Samples

__all__ = [
    "HIDDEN",
    "AllRead",
    "Batch",
    "LayerReader",
    "Ranks",
    "Reduce",
    "Samples",
    "base_model_of",
    "content_of",
    "describe_modules",
    "find_modules",
    "first_tensor",
    "is_sentence_transformer",
    "not_recomputed",
    "reaches_weights",
    "transformer_in",
]
