"""Loading and building guides, freezing them, their batch norm, and telling one from another."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import cpu_offload
from builders import gpt2, llama_config, seeded
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Model,
    LlamaModel,
    TimmWrapperConfig,
)

from hf_guidance import load_guide
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.freezing import calibrate_batch_norm, check_apart, freeze
from hf_guidance.guide.identity import IDENTITY, check_same_guide, fingerprint, identity


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


def test_a_network_as_timm_exports_it_is_a_guide_trained_or_not(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", num_classes=7)
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["num_classes"] == config["num_classes"] == 7  # twice, which transformers trips over
    head = load_guide(tmp_path, auto_class=AutoModelForImageClassification)
    assert same_weights(head.timm_model, network)
    network.reset_classifier(0)
    assert same_weights(load_guide(tmp_path).timm_model, network)
    own = seeded(lambda: timm.create_model("resnet10t", num_classes=0), 2)
    for source in (tmp_path, AutoConfig.from_pretrained(tmp_path)):
        assert same_weights(load_guide(source, untrained=True, seed=2).timm_model, own)


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


# ------------------------------------------------------------------------------------------- placed by a device map


def test_a_guide_spread_by_a_device_map_stays_where_it_is(folder: Path, tmp_path: Path) -> None:
    placed = load_guide(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert {parameter.device.type for parameter in placed.parameters()} == {"meta"}
    elsewhere = torch.device("meta")
    assert freeze(load_guide(folder), device=elsewhere).wte.weight.device == elsewhere
    assert freeze(placed, device=torch.device("cpu")).wte.weight.device == elsewhere
    ids, states = torch.arange(6)[None], []
    for guide in (placed, load_guide(folder)):
        with (
            LayerReader(guide, ["hidden_states"], "guide").reading(lambda _, output: output) as layers,
            torch.no_grad(),
        ):
            guide(input_ids=ids)
        states.append(layers["hidden_states.2"])
    torch.testing.assert_close(*states)


def test_the_fingerprint_does_not_depend_on_where_the_weights_are(folder: Path, tmp_path: Path) -> None:
    expected = fingerprint(load_guide(folder))
    assert fingerprint(cpu_offload(load_guide(folder))) == expected
    assert fingerprint(load_guide(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")) == expected


# ------------------------------------------------------------------------------------------------------- batch norm


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(x)))


def batches(count: int = 3) -> list[Tensor]:
    normal = torch.Generator().manual_seed(0)
    return [i + 2 * torch.randn(8 + 4 * i, 3, generator=normal) for i in range(count)]


def normalised(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (x - mean) / (variance + 1e-5).sqrt()


def test_batch_norm_in_eval_uses_the_running_statistics() -> None:
    guide, (x, *_) = Normed(), batches()
    guide.norm.running_mean.fill_(0.5)
    guide.norm.running_var.fill_(4)
    hidden = guide.linear(x)
    torch.testing.assert_close(freeze(guide, "eval")(x), normalised(hidden, torch.tensor(0.5), torch.tensor(4.0)))


def test_batch_norm_in_batch_uses_the_batchs_statistics_and_changes_no_buffer() -> None:
    guide, (x, *_) = freeze(Normed(), "batch"), batches()
    before = copy.deepcopy(guide.state_dict())
    hidden = guide.linear(x)
    torch.testing.assert_close(guide(x), normalised(hidden, hidden.mean(0), hidden.var(0, unbiased=False)))
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert not guide.dropout.training


def test_calibrated_batch_norm_has_the_average_of_the_batches_statistics() -> None:
    guide = freeze(Normed(), "calibrated")
    guide.norm.running_mean.fill_(7)  # what was there before counts for nothing
    guide.norm.num_batches_tracked.fill_(100)
    xs, seen = batches(), []
    guide.dropout.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    calibrate_batch_norm(guide, [lambda x=x: guide(x) for x in xs])
    hidden = [guide.linear(x) for x in xs]
    torch.testing.assert_close(guide.norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(guide.norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert seen == [False] * 3
    assert not guide.norm.training
    assert guide.norm.momentum == 0.1
    before = copy.deepcopy(guide.state_dict())
    guide(xs[0])
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())


def test_a_calibration_that_fails_leaves_the_guide_in_evaluation_mode() -> None:
    guide = freeze(Normed(), "calibrated")
    with pytest.raises(RuntimeError, match="shapes"):
        calibrate_batch_norm(guide, [lambda: guide(torch.ones(5, 2))])
    assert (guide.norm.training, guide.norm.momentum) == (False, 0.1)


def test_one_guide_may_be_frozen_in_one_mode_after_another() -> None:
    guide, (x, *_) = Normed(), batches()
    by_running_statistics = freeze(guide, "eval")(x)
    assert not torch.allclose(freeze(guide, "batch")(x), by_running_statistics)
    torch.testing.assert_close(freeze(guide, "eval")(x), by_running_statistics)
    freeze(guide, "batch")
    calibrate_batch_norm(freeze(guide, "calibrated"), [lambda: guide(x)])
    torch.testing.assert_close(guide.norm.running_mean, guide.linear(x).mean(0))


def test_batch_norm_without_running_statistics_uses_the_batchs_in_every_mode() -> None:
    for mode in ("eval", "batch", "calibrated"):
        guide, (x, *_) = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), batches()
        calibrate_batch_norm(freeze(guide, mode), [lambda: guide(x)])  # noqa: B023  called at once
        torch.testing.assert_close(guide(x), normalised(x, x.mean(0), x.var(0, unbiased=False)))


@pytest.mark.parametrize("mode", ["batch", "calibrated"])
def test_another_mode_for_a_guide_without_batch_norm_is_an_error(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"guide_batch_norm='{mode}', but the guide \(LlamaModel\) has no batch norm"):
        freeze(LlamaModel(llama_config()), mode)


# --------------------------------------------------------------------------------------------------------- identity


class Buffers(nn.Module):
    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value)


ODD = {
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "short": torch.ones(2, dtype=torch.bfloat16),
    "complex": torch.ones(2, dtype=torch.complex64),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}


def test_the_fingerprint_is_the_sha256_of_names_types_shapes_and_bytes() -> None:
    model = Buffers(b=torch.tensor([True]), a=torch.arange(6.0).reshape(2, 3))
    content = b"atorch.float32(2, 3)" + np.arange(6, dtype="<f4").tobytes() + b"btorch.bool(1,)" + b"\1"
    assert fingerprint(model) == "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", [name for name, value in ODD.items() if value.numel()])
def test_the_fingerprint_changes_with_one_bit(name: str) -> None:
    value = ODD[name].contiguous()
    raw = value.reshape(-1).view(torch.uint8).clone()
    raw[0] ^= 1
    changed = {**ODD, name: raw.view(value.dtype).reshape(value.shape)}
    assert fingerprint(Buffers(**changed)) != fingerprint(Buffers(**ODD))


def test_the_fingerprint_changes_with_names_types_and_shapes() -> None:
    zeros = [{"a": torch.zeros(4)}, {"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.zeros(4).int()}]
    assert len({fingerprint(Buffers(**each)) for each in zeros}) == 4


def test_the_fingerprint_does_not_change_with_what_is_not_saved_nor_by_freezing_or_saving(tmp_path: Path) -> None:
    model = GPT2Model(gpt2().config)
    before = fingerprint(model)
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    assert fingerprint(freeze(model)) == before
    model.save_pretrained(tmp_path)
    assert fingerprint(load_guide(tmp_path)) == before


def test_identity_says_where_a_guide_is_from_and_what_it_is() -> None:
    guide = load_guide(llama_config(), seed=2)
    about = identity(guide)
    assert {key: about[key] for key in ("source", "untrained", "seed")} == {
        "source": "llama",
        "untrained": True,
        "seed": 2,
    }
    assert (about["architecture"], about["parameters"]) == ("LlamaModel", sum(p.numel() for p in guide.parameters()))
    assert about["fingerprint"] == fingerprint(guide)
    assert about["versions"]["torch"] == torch.__version__


def test_a_live_module_has_an_identity_without_an_origin() -> None:
    about = identity(Normed())
    assert (about["source"], about["untrained"], about["architecture"]) == (None, None, "Normed")


def test_going_on_with_another_guide_is_an_error_that_names_both() -> None:
    then, now = (identity(load_guide(llama_config(), seed=seed)) for seed in (0, 1))
    words = (
        r"checkpoint-5 was guided by LlamaModel \(llama, untrained, seed 0, sha256:.*this trainer's guide is "
        r"LlamaModel \(llama, untrained, seed 1, .* pass the same guide"
    )
    with pytest.raises(ValueError, match=words):
        check_same_guide(now, then, "checkpoint-5")
    check_same_guide(then, dict(then), "checkpoint-5")
    check_same_guide(now, {}, "a checkpoint from before guides had fingerprints")


def test_a_live_module_is_called_one_when_it_is_another() -> None:
    with pytest.raises(ValueError, match=r"this trainer's guide is Normed \(live module, with given weights, sha256:"):
        check_same_guide(identity(Normed()), identity(Normed()), "checkpoint-5")


def test_a_guide_that_is_or_shares_the_target_is_an_error() -> None:
    target = gpt2()
    sharing = copy.deepcopy(target)
    sharing.transformer.wte = target.transformer.wte
    for guide, shared in ((target, len(list(target.parameters()))), (target.transformer.h, 24), (sharing, 1)):
        with pytest.raises(ValueError, match=rf"the guide shares {shared} parameters with the target.*copy\.deepcopy"):
            check_apart(target, guide)
    check_apart(target, copy.deepcopy(target))


def test_what_torch_compile_returns_is_refused_in_a_networks_place() -> None:
    target, guide = gpt2(), gpt2()
    with pytest.raises(
        ValueError, match=r"the guide is the result of torch.compile\(guide\).*guide.compile\(\) instead"
    ):
        check_apart(target, torch.compile(guide))
    guide.compile()
    check_apart(target, guide)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    network = gpt2()
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"Cannot load guide .*model\.safetensors.* pickled ones are refused"):
        load_guide(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors is always on"):
        load_guide(tmp_path, use_safetensors=False)
