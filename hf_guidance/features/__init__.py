"""Features of a network: the outputs of its layers on a batch, and the samples they belong to.

Read `reader` first, which hooks hidden states and the modules that `modules` finds, then `rows`, which leaves padding
out, and `samples`, which defines one sample. `hidden_states`, `batch_first`, `layer_drop` and `conventions` know how
networks differ; `choices` picks rows, and `distributed` joins the batches of all processes.
"""

from hf_guidance.features.batch import Batch, documents_of, is_packed, take_rows
from hf_guidance.features.choices import choose_rows
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.distributed import Ranks, ranks_of
from hf_guidance.features.gradients import reaches_weights
from hf_guidance.features.hidden_states import first_tensor
from hf_guidance.features.inside import check_is_network, holds_transformer, is_sentence_transformer, transformer_in
from hf_guidance.features.layer_stacks import in_words
from hf_guidance.features.masks import warn_if_added
from hf_guidance.features.mismatches import why_too_few
from hf_guidance.features.modules import describe_modules, find_modules
from hf_guidance.features.reader import (
    HIDDEN,
    AllRead,
    LayerReader,
    Reduce,
    base_model_of,
    not_recomputed,
)
from hf_guidance.features.rows import check_is_batch, content_of, masks_of, side_of, tensors_of, valid_positions
from hf_guidance.features.samples import Samples

__all__ = [
    "HIDDEN",
    "AllRead",
    "Batch",
    "Conventions",
    "LayerReader",
    "Ranks",
    "Reduce",
    "Samples",
    "base_model_of",
    "check_is_batch",
    "check_is_network",
    "choose_rows",
    "content_of",
    "describe_modules",
    "documents_of",
    "find_modules",
    "first_tensor",
    "holds_transformer",
    "in_words",
    "is_packed",
    "is_sentence_transformer",
    "masks_of",
    "mix",
    "not_recomputed",
    "ranks_of",
    "reaches_weights",
    "side_of",
    "take_rows",
    "tensors_of",
    "transformer_in",
    "valid_positions",
    "warn_if_added",
    "why_too_few",
]
