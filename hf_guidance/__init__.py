"""Guidance: train a network by steering it with a frozen one of another architecture."""

import hf_guidance.targets  # noqa: F401  registers them with the Auto classes
from hf_guidance.config import GuidanceConfig
from hf_guidance.guide.loading import load_guide
from hf_guidance.guide.own_base import load_guide_of_base
from hf_guidance.guide.rebuilding import load_guide_of
from hf_guidance.loss import GuidanceLoss
from hf_guidance.similarity.layers import gram
from hf_guidance.similarity.measures import debiased_cka, linear_cka, procrustes, rbf_cka, ridge, ridge_loo, rsa
from hf_guidance.similarity.registry import register_measure
from hf_guidance.trainer.guidance_mixin import GuidanceMixin
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer

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
    "load_guide_of_base",
    "procrustes",
    "rbf_cka",
    "register_measure",
    "ridge",
    "ridge_loo",
    "rsa",
]
