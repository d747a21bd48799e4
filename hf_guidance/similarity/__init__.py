"""Similarities of layers: a layer on a batch in one of two forms, and the measures of two layers.

Nothing of Hugging Face is imported. Read `measures` first, which `registry` lists. `layers` makes the two forms, of
wide layers after a `sketch`; `cosines`, `regression`, `rotation` and functions of your `own` compare them; `pair_loss`
sums over the pairs of layers.
"""

from hf_guidance.similarity.cosines import agreement_of_halves
from hf_guidance.similarity.half_precision import for_tensor_cores
from hf_guidance.similarity.layers import PRIMAL_BELOW, Form, Layer, flat, gram, layer_of
from hf_guidance.similarity.matrices import TINY, outer, u_center
from hf_guidance.similarity.measures import debiased_cka, linear_cka, procrustes, rbf_cka, ridge, ridge_loo, rsa
from hf_guidance.similarity.own import is_own
from hf_guidance.similarity.pair_loss import Groups, guidance_loss, guidance_loss_of_groups, similarities
from hf_guidance.similarity.registry import (
    ALL_INVARIANCES,
    MEASURES,
    PENALTIES,
    Measure,
    check_measure,
    check_takes_sketch,
    get_measure,
    min_samples,
    primal_below_of,
    register_measure,
)
from hf_guidance.similarity.sketch import Sketch

__all__ = [
    "ALL_INVARIANCES",
    "MEASURES",
    "PENALTIES",
    "PRIMAL_BELOW",
    "TINY",
    "Form",
    "Groups",
    "Layer",
    "Measure",
    "Sketch",
    "agreement_of_halves",
    "check_measure",
    "check_takes_sketch",
    "debiased_cka",
    "flat",
    "for_tensor_cores",
    "get_measure",
    "gram",
    "guidance_loss",
    "guidance_loss_of_groups",
    "is_own",
    "layer_of",
    "linear_cka",
    "min_samples",
    "outer",
    "primal_below_of",
    "procrustes",
    "rbf_cka",
    "register_measure",
    "ridge",
    "ridge_loo",
    "rsa",
    "similarities",
    "u_center",
]
