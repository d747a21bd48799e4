"""Frozen guides: their batch norm, where they are placed, and that they are networks of their own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders import gpt2, llama_config
from torch import Tensor, nn
from transformers import (
    GPT2Model,
    LlamaModel,
)

from hf_guidance import load_guide
from hf_guidance.features.inside import check_is_network
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.freezing import calibrate_batch_norm, check_apart, check_types, freeze


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    gpt2(seed=3).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


SPREAD = {"wte": "disk", "wpe": "disk", "h": "disk", "ln_f": "cpu"}


def test_a_guide_spread_by_a_device_map_stays_where_it_is(folder: Path, tmp_path: Path) -> None:
    placed = load_guide(folder, device_map=SPREAD, offload_folder=tmp_path / "offload")
    elsewhere = torch.device("meta")
    assert placed.wte.weight.device == elsewhere
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


def test_a_class_is_no_network() -> None:
    words = (
        r" is the class GPT2Model; expected a network: make one of it, such as GPT2Model\(config\), or load one with"
    )
    for role in ("target", "guide"):
        with pytest.raises(ValueError, match=role + words):
            check_is_network(GPT2Model, role)
    with pytest.raises(ValueError, match=r"target is a NoneType; expected a network, which is an nn\.Module"):
        check_is_network(None, "target")
    with pytest.raises(ValueError, match="guide" + words):
        check_types(GPT2Model, None)  # type: ignore[arg-type]
