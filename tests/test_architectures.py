"""A small network of each kind of architecture guides and is guided: the checks of tests/scripts/architectures.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

from architecture_checks import CHECKS
from architectures import ROLES, in_role
from small_networks import case_named, names_of

NAMES = [
    "bert+MASKED_LM",
    "deberta-v2+MASKED_LM",
    "albert",
    "electra",
    "modernbert+MASKED_LM",
    "gpt2+CAUSAL_LM",
    "llama+CAUSAL_LM",
    "mixtral+CAUSAL_LM",
    "gemma2+CAUSAL_LM",
    "qwen3_moe+CAUSAL_LM",
    "deepseek_v3+CAUSAL_LM",
    "bloom+CAUSAL_LM",
    "qwen3_next+CAUSAL_LM",
    "t5+SEQ_TO_SEQ_CAUSAL_LM",
    "bart+SEQ_TO_SEQ_CAUSAL_LM",
    "whisper",
    "wav2vec2+CTC",
    "vit+IMAGE_CLASSIFICATION",
    "swin+IMAGE_CLASSIFICATION",
    "convnext+IMAGE_CLASSIFICATION",
    "resnet+IMAGE_CLASSIFICATION",
    "detr",
    "clip",
    "paligemma+IMAGE_TEXT_TO_TEXT",
    "qwen2_vl+IMAGE_TEXT_TO_TEXT",
    "timm/test_vit",
    "timm/test_resnet",
    "torchvision/shufflenet_v2_x0_5",
    "torch/encoder",
    "torch/attention",
    "torch/lstm",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_guides_and_is_guided(name: str) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = case_named(name)
        results = {role: in_role(case, role) for role in ROLES}
    for role, result in results.items():
        assert result["result"] == "right", (role, result)
        assert set(result["checks"]) == {check.__name__ for check in CHECKS}


def test_each_family_has_names() -> None:
    assert len(names_of("transformers")) > 250
    assert len(names_of("timm")) > 50
