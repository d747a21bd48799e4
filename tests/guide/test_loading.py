"""Loading and building guides: from a folder, the Hub, timm or a config, trained or not."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from builders import gpt2, llama_config, seeded
from huggingface_hub import constants
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Model,
    LayoutLMv2Config,
    LlamaModel,
    TimmWrapperConfig,
)

from hf_guidance import load_guide
from hf_guidance.guide.identity import IDENTITY, fingerprint


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    gpt2(seed=3).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


# ---------------------------------------------------------------------------------------------------------- loading


def test_a_saved_model_is_loaded_without_its_head(folder: Path) -> None:
    guide = load_guide(folder)
    assert type(guide) is GPT2Model
    assert same_weights(guide, gpt2(seed=3).transformer)
    assert getattr(guide, IDENTITY) == {"source": "trained", "untrained": False, "seed": None, "revision": None}


def test_arguments_of_from_pretrained_are_passed_on(folder: Path) -> None:
    assert load_guide(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_every_guide_is_frozen_and_in_evaluation_mode(folder: Path) -> None:
    for guide in (load_guide(folder), load_guide(llama_config())):
        assert not any(parameter.requires_grad for parameter in guide.parameters())
        assert not any(module.training for module in guide.modules())


def test_a_folder_named_by_a_relative_path_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert getattr(load_guide("."), IDENTITY)["source"] == "trained"


def test_weights_that_a_checkpoint_lacks_are_the_same_each_time(tmp_path: Path) -> None:
    sizes = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)  # it has no pooler
    state = torch.get_rng_state()
    guides = [load_guide(tmp_path, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(guides[0], guides[1])
    assert not torch.equal(guides[0].pooler.dense.weight, guides[2].pooler.dense.weight)


@pytest.mark.parametrize("source", ["nobody/nothing", "timm/no_such_network", "/no/such/folder"])
@pytest.mark.parametrize("untrained", [False, True])
def test_a_source_that_is_nowhere_is_an_error_that_says_what_is_possible(
    source: str, untrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9"  # what HF_ENDPOINT would set, had it not been read at import
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries
    words = rf"Cannot load guide '{source}': .* A guide is a local folder with a config.json, .*, or 'timm/<arch"
    with pytest.raises(ValueError, match=words):
        load_guide(source, untrained=untrained)


@pytest.mark.parametrize("source", ["./nowhere", "../nowhere", "runs/of/mine", Path("nowhere"), "~/nowhere"])
def test_a_folder_that_is_not_there_is_said_without_asking_the_hub(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "asked")
    words = re.escape(f"Cannot load guide '{source}': there is no such folder (seen from {tmp_path}).")
    with pytest.raises(ValueError, match=words + (" '~' is not expanded" if str(source)[0] == "~" else " A guide is")):
        load_guide(source)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None], ids=str)
def test_damaged_weights_are_named(folder: Path, content: bytes | None) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500] if content is None else content)
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged or incomplete \(.*\)\. Save or fetch .*git lfs"
    ):
        load_guide(folder)


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"activation_function": "nope"}, "KeyError 'nope'. Its config may be damaged, or need another version of"),
        ({"n_head": 3}, "must be divisible by num_heads"),
        ({"n_embd": "x"}, "Field 'n_embd' expected int, got str"),
        (None, "its config.json is no JSON object"),
    ],
    ids=str,
)
def test_whatever_a_config_makes_other_libraries_raise_is_a_value_error(
    folder: Path, config: dict[str, Any] | None, words: str, untrained: bool
) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps([] if config is None else content | config))
    with pytest.raises(ValueError, match=f"^Cannot load guide '{folder}': .*{words}"):
        load_guide(folder, untrained=untrained)


def test_a_package_that_an_architecture_needs_is_named() -> None:
    with pytest.raises(ValueError, match=r"guide from this LayoutLMv2Config: ImportError .* requires the detectron2"):
        load_guide(LayoutLMv2Config())


def test_a_name_of_timm_without_its_prefix_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Cannot load guide 'resnet18': .* timm has it: 'timm/resnet18'\."):
        load_guide("resnet18", untrained=True)


def test_an_empty_folder_is_an_error_that_says_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot load guide '.*': .* A guide is a local folder with a config.json"):
        load_guide(tmp_path)


def test_a_folder_with_a_config_alone_is_an_error_that_names_untrained(tmp_path: Path) -> None:
    llama_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights: for random ones pass untrained=True"):
        load_guide(tmp_path)
    assert load_guide(tmp_path, untrained=True)


def test_weights_that_a_checkpoint_lacks_are_named_and_the_head_it_has_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    load_guide(tmp_path, seed=3)
    assert "no weights for ['pooler.dense.bias', 'pooler.dense.weight']: they are drawn with seed 3" in caplog.text
    assert "cls.predictions" not in caplog.text + capfd.readouterr().err


# -------------------------------------------------------------------------------------------------------- untrained


def test_a_config_gives_an_untrained_guide_with_the_architectures_own_initialisation() -> None:
    guide, own = load_guide(llama_config(), seed=5), seeded(lambda: AutoModel.from_config(llama_config()), 5)
    assert type(guide) is LlamaModel
    assert same_weights(guide, own)
    assert getattr(guide, IDENTITY) == {"source": "llama", "untrained": True, "seed": 5, "revision": None}


def test_a_saved_model_can_be_had_untrained(folder: Path) -> None:
    guide = load_guide(folder, untrained=True, seed=4)
    assert same_weights(guide, seeded(lambda: GPT2Model(gpt2().config), 4))
    assert not same_weights(guide, load_guide(folder))
    assert getattr(guide, IDENTITY) == {"source": "trained", "untrained": True, "seed": 4, "revision": None}


@pytest.mark.parametrize("make", [llama_config, lambda: TimmWrapperConfig(architecture="resnet10t")])
def test_the_seed_alone_decides_on_an_untrained_guide_and_no_random_state_moves(make: Callable[[], Any]) -> None:
    prints = []
    for seed in (0, 0, 1):
        torch.rand(7)
        state = torch.get_rng_state()
        prints.append(fingerprint(load_guide(make(), seed=seed)))
        assert torch.equal(torch.get_rng_state(), state)
    assert prints[0] == prints[1] != prints[2]


def test_an_untrained_timm_guide_keeps_timms_own_initialisation() -> None:
    guide = load_guide("timm/resnet18", untrained=True, seed=4)
    own = seeded(lambda: timm.create_model("resnet18", num_classes=0), 4)
    assert same_weights(guide.timm_model, own)
    kaiming = (2 / (64 * 3 * 3)) ** 0.5  # fan_out of layer1's convs; transformers' own would be 0.02
    assert guide.timm_model.layer1[0].conv1.weight.std().item() == pytest.approx(kaiming, rel=0.02)
    assert getattr(guide, IDENTITY)["source"] == "timm/resnet18"


def test_a_timm_guide_may_be_named_by_the_tag_of_its_weights() -> None:
    guides = [load_guide(name, untrained=True) for name in ("timm/resnet10t", "timm/resnet10t.c3_in1k")]
    assert same_weights(*guides)


def test_arguments_for_loading_weights_are_an_error_where_none_are_loaded(folder: Path) -> None:
    for source in (llama_config(), folder):
        with pytest.raises(
            ValueError, match=r"\['dtype'\] are for loading weights: leave them out, since an untrained guide"
        ):
            load_guide(source, untrained=True, dtype=torch.bfloat16)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    network = gpt2()
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"Cannot load guide .*model\.safetensors.* pickled ones are refused"):
        load_guide(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors is always on"):
        load_guide(tmp_path, use_safetensors=False)


def test_a_module_is_a_guide_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    guide = load_guide(module)
    assert guide is module
    assert not guide.training
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    assert not hasattr(guide, IDENTITY)


def test_options_for_a_module_and_a_source_of_another_type_are_named() -> None:
    with pytest.raises(ValueError, match="untrained, seed: a module is used as it is"):
        load_guide(nn.Linear(2, 2), untrained=True, seed=3)
    with pytest.raises(ValueError, match=r"Cannot load a guide from a NoneType\. A guide is a local folder"):
        load_guide(None)
    with pytest.raises(ValueError, match=r"the guide is the result of torch\.compile\(guide\)"):
        load_guide(torch.compile(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"untrained": "no"}, r"untrained is 'no' \(str\); expected True or False"),
        ({"untrained": True, "trust_remote_code": "no"}, r"trust_remote_code is 'no' \(str\); expected True or False"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; expected an integer from -9223372036854775808 to 1844"),
    ],
)
def test_options_of_another_type_or_size_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_guide(llama_config(), **options)


def test_a_network_that_torchscript_compiled_is_refused() -> None:
    words = r"the guide \(.*\) is compiled by TorchScript, which does not show its layers: pass the module"
    with pytest.raises(ValueError, match=words):
        load_guide(torch.jit.script(nn.Linear(2, 2)))
