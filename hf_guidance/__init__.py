"""Guidance: train a network by steering it with a frozen one of another architecture."""

import hf_guidance.targets  # noqa: F401  registers them with the Auto classes
from hf_guidance.config import GuidanceConfig
from hf_guidance.guide import load_guide
from hf_guidance.kernels import gram
from hf_guidance.loss import GuidanceLoss
from hf_guidance.pushed import load_guide_of
from hf_guidance.similarity import debiased_cka, linear_cka, procrustes, rbf_cka, ridge, rsa
from hf_guidance.trainer import GuidanceMixin, GuidanceTrainer

__version__ = "0.1.0"

__all__ = [
    "GuidanceConfig",
    "GuidanceLoss",
    "GuidanceMixin",
    "GuidanceTrainer",
    "debiased_cka",
    "gram",
    "linear_cka",
    "load_guide",
    "load_guide_of",
    "procrustes",
    "rbf_cka",
    "ridge",
    "rsa",
]
