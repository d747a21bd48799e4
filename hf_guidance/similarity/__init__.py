"""Similarities of layers: a layer on a batch in one of two forms, and the measures of two layers.

Pure functions of tensors, without Hugging Face imports. Read `measures` first. `layers` makes the two forms, `cosines`,
`regression` and `rotation` compare them, and `pair_loss` sums over the pairs of layers.
"""

from hf_guidance.similarity.layers import Layer, gram, layer_of
from hf_guidance.similarity.matrices import TINY
from hf_guidance.similarity.measures import debiased_cka, linear_cka, procrustes, rbf_cka, ridge, ridge_loo, rsa
from hf_guidance.similarity.pair_loss import guidance_loss, similarities
from hf_guidance.similarity.registry import (
    ALL_INVARIANCES,
    MEASURES,
    Measure,
    check_measure,
    get_measure,
    min_samples,
    register_measure,
)
from hf_guidance.similarity.sketch import Sketch

__all__ = [
    "ALL_INVARIANCES",
    "MEASURES",
    "TINY",
    "Layer",
    "Measure",
    "Sketch",
    "check_measure",
    "debiased_cka",
    "get_measure",
    "gram",
    "guidance_loss",
    "layer_of",
    "linear_cka",
    "min_samples",
    "procrustes",
    "rbf_cka",
    "register_measure",
    "ridge",
    "ridge_loo",
    "rsa",
    "similarities",
]
