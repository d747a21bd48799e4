"""Configs of guides: from a config, a folder or timm, and those that timm exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from builders import llama_config, seeded
from trainers import same
from transformers import AutoConfig, AutoModelForImageClassification, LlamaConfig, ResNetConfig, TimmWrapperConfig

from hf_guidance import load_guide
from hf_guidance.guide.configs import config_if_timm_exported, config_of, is_resnet


def test_a_network_as_timm_exports_it_is_a_guide_trained_or_not(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", num_classes=7)
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    own_args = config.get("model_args", {"num_classes": 7})  # of later versions: twice, which transformers trips over
    assert own_args["num_classes"] == config["num_classes"] == 7
    head = load_guide(tmp_path, auto_class=AutoModelForImageClassification)
    assert same(head.timm_model.state_dict(), network.state_dict())
    network.reset_classifier(0)
    assert same(load_guide(tmp_path).timm_model.state_dict(), network.state_dict())
    own = seeded(lambda: timm.create_model("resnet10t", num_classes=0), 2)
    for source in (tmp_path, AutoConfig.from_pretrained(tmp_path)):
        assert same(load_guide(source, untrained=True, seed=2).timm_model.state_dict(), own.state_dict())
    if "model_args" in config:
        assert "num_classes" not in config_if_timm_exported(str(tmp_path), config).model_args


def test_a_config_is_copied_and_a_name_of_timm_needs_no_files() -> None:
    given = llama_config()
    found = config_of(given)
    assert found is not given
    assert found.to_dict() == given.to_dict()
    named = config_of("timm/test_resnet")
    assert (type(named), named.architecture) == (TimmWrapperConfig, "test_resnet")


def test_a_folder_has_the_config_that_was_saved_there(tmp_path: Path) -> None:
    llama_config(layers=5).save_pretrained(tmp_path)
    found = config_of(str(tmp_path))
    assert (type(found), found.num_hidden_layers) == (LlamaConfig, 5)
    assert config_if_timm_exported(str(tmp_path), found.to_dict()) is None
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="Unrecognized model"):
        config_of(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ResNetConfig(), True),
        (TimmWrapperConfig(architecture="resnet10t"), True),
        (TimmWrapperConfig(architecture="test_vit"), False),
        (llama_config(), False),
    ],
)
def test_a_resnet_is_told_by_the_config_in_its_folder(config: Any, told: bool, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    assert is_resnet(str(tmp_path)) is told


def test_a_resnet_of_timm_is_told_by_its_name_and_a_guide_that_is_nowhere_is_none(tmp_path: Path) -> None:
    assert is_resnet("timm/resnet18.a1_in1k")
    assert not is_resnet("timm/test_vit")
    assert not is_resnet(str(tmp_path / "resnet"))
