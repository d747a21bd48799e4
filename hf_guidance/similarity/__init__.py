"""Similarities of layers: a layer's Gram matrix or features on a batch, and the measures of two layers.

Pure functions of tensors, without Hugging Face imports. Read `measures` first. `representation` decides what stands for
a layer, `grams` and its helpers compute it fast, and `pair_loss` sums over the pairs of layers.
"""

from hf_guidance.similarity.grams import gram
from hf_guidance.similarity.measures import (
    ALL_INVARIANCES,
    MEASURES,
    TINY,
    Measure,
    debiased_cka,
    get_measure,
    linear_cka,
    procrustes,
    rbf_cka,
    ridge,
    rsa,
)
from hf_guidance.similarity.pair_loss import guidance_loss, similarities
from hf_guidance.similarity.sketch import Sketch

__all__ = [
    "ALL_INVARIANCES",
    "MEASURES",
    "TINY",
    "Measure",
    "Sketch",
    "debiased_cka",
    "get_measure",
    "gram",
    "guidance_loss",
    "linear_cka",
    "procrustes",
    "rbf_cka",
    "ridge",
    "rsa",
    "similarities",
]
