"""Similarities of layers: a layer on a batch, its Gram matrix or features, and the measures on two of them.

Pure functions of tensors, which know nothing of Hugging Face. `measures` has those to read first; `representation` is
what a layer becomes, `gram` and its helpers make it cheap, and `pair_loss` sums over the pairs of a network.
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
