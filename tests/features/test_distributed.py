"""Ranks: what they gather, on a group of one process, and that only a rank's own samples carry a gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_guidance.features import distributed
from hf_guidance.features.distributed import Ranks, ranks_of


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


def test_without_a_process_group_there_are_no_ranks() -> None:
    with pytest.raises(ValueError, match=r"there is no process group: call torch\.distributed\.init_process_group"):
        Ranks()


def test_one_process_takes_its_own_batch_as_the_global_one_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    distributed._say_that_it_is_local.cache_clear()
    caplog.set_level(logging.INFO)
    assert [ranks_of(kind) for kind in ("local", "accumulated", "global", "global")] == [None] * 4
    words = "similarity_batch='global' compares over the batch of this process, because it is the only one."
    assert [record.getMessage() for record in caplog.records] == [words]


def test_several_processes_that_form_no_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = (
        r"the batches of all processes, and 2 were started, but there is no process group: call .*init_process_group"
    )
    with pytest.raises(ValueError, match=words):
        ranks_of("global")
    assert ranks_of("local") is None


def test_a_process_group_gives_the_ranks(ranks: Ranks) -> None:
    found = ranks_of("global")
    assert isinstance(found, Ranks)
    assert found.scale == 1


def test_what_one_rank_gathers_is_its_own(ranks: Ranks) -> None:
    assert (ranks.rank, ranks.scale) == (0, 1)
    assert ranks.numbers([3, 5], torch.device("cpu")) == [[3, 5]]
    assert ranks.smallest(torch.tensor([5, 1, 3]), 2).tolist() == [1, 3]


def test_samples_are_padded_to_the_common_length_keep_their_gradient_and_are_counted(ranks: Ranks) -> None:
    x = torch.randn(3, 4, 2, requires_grad=True)
    found = ranks.gather(x, [3], length=6)
    assert torch.equal(found[:, :4], x)
    assert found[:, 4:].count_nonzero() == 0
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert ranks.bytes_sent == 3 * 6 * 2 * 4
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(ranks.gather(mask, [3]), mask)
