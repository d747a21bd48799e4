"""The guide: loaded or built, frozen, identified, fed and run.

Read `forward` first: it feeds the guide in a step and runs it, or takes its features from the `cache`. `inputs` makes
or checks what it is fed. `loading`, `rebuilding` and `own_base` make a guide, `freezing` freezes it, `identity` tells
it from others, and `sharding` spreads it over processes.
"""

from hf_guidance.guide.cache import row_checksums
from hf_guidance.guide.configs import config_of
from hf_guidance.guide.forward import (
    GuideRunning,
    accepted_columns,
    forward_arguments,
    generator_for,
    guide_batch,
    rows_for_guide,
    seen_by,
    seen_by_target,
    without_guide,
)
from hf_guidance.guide.freezing import (
    BATCH_NORM,
    calibrate_batch_norm,
    check_apart,
    check_not_wrapped,
    check_types,
    freeze,
)
from hf_guidance.guide.identity import check_same_guide, fingerprint
from hf_guidance.guide.inputs import (
    GUIDE_PREFIX,
    NO_LABEL,
    check_own_columns,
    check_vocabularies,
    noise_like,
    vocabulary_size,
)
from hf_guidance.guide.loading import POSSIBLE, AutoClass, load_guide, untrained_network
from hf_guidance.guide.own_base import OwnBase, load_guide_of_base
from hf_guidance.guide.random_state import drawn_from, kept_random_state, set_random_state
from hf_guidance.guide.rebuilding import load_guide_of
from hf_guidance.guide.sharding import built_whole, check_whole, gathered, is_sharded, shard, whole_state

__all__ = [
    "BATCH_NORM",
    "GUIDE_PREFIX",
    "NO_LABEL",
    "POSSIBLE",
    "AutoClass",
    "GuideRunning",
    "OwnBase",
    "accepted_columns",
    "built_whole",
    "calibrate_batch_norm",
    "check_apart",
    "check_not_wrapped",
    "check_own_columns",
    "check_same_guide",
    "check_types",
    "check_vocabularies",
    "check_whole",
    "config_of",
    "drawn_from",
    "fingerprint",
    "forward_arguments",
    "freeze",
    "gathered",
    "generator_for",
    "guide_batch",
    "is_sharded",
    "kept_random_state",
    "load_guide",
    "load_guide_of",
    "load_guide_of_base",
    "noise_like",
    "row_checksums",
    "rows_for_guide",
    "seen_by",
    "seen_by_target",
    "set_random_state",
    "shard",
    "untrained_network",
    "vocabulary_size",
    "whole_state",
    "without_guide",
]
