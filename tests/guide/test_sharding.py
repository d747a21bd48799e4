"""Sharding of a guide over processes: what is cut, what is put together again, and when it is refused.

`tests/trainer/test_trouble.py` runs a sharded guide on two real processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from builders import llama
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.integrations import deepspeed

from hf_guidance.guide.sharding import built_whole, check_whole, gathered, is_sharded, shard, whole_state


@pytest.fixture
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first of two processes on CPUs, whose messages go nowhere."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: None)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_one_process_keeps_the_guide_whole_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    guide = llama()
    assert shard(guide) is guide
    assert not is_sharded(guide)
    assert "shard_guide has no effect with one process" in caplog.text


@pytest.mark.usefixtures("_two_processes")
def test_each_of_two_processes_keeps_half_of_every_block() -> None:
    guide, other = llama(layers=3), llama(layers=3)
    assert shard(guide) is guide
    assert is_sharded(guide)
    for name, parameter in guide.layers.named_parameters():
        full = other.layers.get_parameter(name)
        assert parameter.to_local().numel() == full.numel() // 2, name
        assert torch.equal(parameter.to_local(), full[: len(full) // 2]), name
    assert type(guide) is type(other)  # transformers finds the states of a model by its class
    before = [id(parameter) for parameter in guide.parameters()]
    assert [id(parameter) for parameter in shard(guide).parameters()] == before


@pytest.mark.parametrize("mark", [{"hf_device_map": {"": "cpu"}}, {"is_quantized": True}])
def test_a_guide_whose_weights_are_not_plain_is_refused(mark: dict[str, object]) -> None:
    guide = llama()
    for name, value in mark.items():
        setattr(guide, name, value)
    with pytest.raises(ValueError, match=r"quantised or spread by a device_map: load it without these, or leave"):
        shard(guide)


def test_a_guide_in_pieces_of_zero_3_is_refused() -> None:
    guide = nn.Linear(2, 2)
    check_whole(guide)
    guide.weight.ds_id = 0  # the mark of DeepSpeed
    with pytest.raises(ValueError, match=r"built in pieces.* Load it with load_guide, or before TrainingArguments"):
        check_whole(guide)


class Zero3:
    """The settings that transformers keeps while DeepSpeed is set up."""

    def is_zero3(self) -> bool:
        return True


def test_networks_are_built_whole_though_deepspeed_is_set_up_and_it_is_afterwards() -> None:
    settings = Zero3()
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with pytest.raises(RuntimeError, match="while building, zero3 False"), built_whole():
            raise RuntimeError(f"while building, zero3 {deepspeed.is_deepspeed_zero3_enabled()}")
        assert deepspeed._hf_deepspeed_config_weak_ref() is settings
    finally:
        deepspeed.unset_hf_deepspeed_config()
    with built_whole():
        assert not deepspeed.is_deepspeed_zero3_enabled()


def test_what_is_whole_stays_and_a_whole_state_is_a_copy() -> None:
    network, number = nn.BatchNorm1d(2), 3.5
    assert gathered(number) is number
    assert gathered(network.weight) is network.weight
    state = whole_state(network)
    assert state.keys() == network.state_dict().keys()
    network.running_mean.fill_(7)
    assert state["running_mean"].tolist() == [0, 0]
