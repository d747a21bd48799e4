"""Telling one guide from another: fingerprints, origins, and resuming with another guide."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from builders import gpt2, llama_config
from torch import Tensor, nn
from transformers import (
    GPT2Model,
)

from hf_guidance import load_guide
from hf_guidance.guide.freezing import freeze
from hf_guidance.guide.identity import check_same_guide, fingerprint, identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    gpt2(seed=3).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_the_fingerprint_does_not_depend_on_where_the_weights_are(folder: Path, tmp_path: Path) -> None:
    expected = fingerprint(load_guide(folder))
    assert fingerprint(cpu_offload(load_guide(folder))) == expected
    places = {"wte": "disk", "wpe": "disk", "h": "disk", "ln_f": "cpu"}
    assert fingerprint(load_guide(folder, device_map=places, offload_folder=tmp_path / "offload")) == expected


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
    about = identity(nn.Linear(3, 4))
    assert (about["source"], about["untrained"], about["architecture"]) == (None, None, "Linear")


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
    with pytest.raises(ValueError, match=r"this trainer's guide is Linear \(live module, with given weights, sha256:"):
        check_same_guide(identity(nn.Linear(3, 4)), identity(nn.Linear(3, 4)), "checkpoint-5")
