"""Modules with the batch on their first axis, told from sequence-first ones where the shape leaves it open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import gpt2
from torch import Tensor, nn
from transformers import XLNetConfig, XLNetModel

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.batch_first import BatchFirst
from hf_guidance.features.reader import LayerReader


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_module_whose_first_axis_is_the_batch_by_chance_is_refused(batch_first: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.drop = nn.Embedding(17, 8), nn.GRU(8, 8, batch_first=batch_first), nn.Dropout()

        def forward(self, input_ids: Tensor) -> Any:
            states = self.embed(input_ids)
            return self.drop(self.rnn(states if batch_first else states.transpose(0, 1))[0])

    network, square, runs = Recurrent(), torch.zeros(5, 5, dtype=torch.int64), []
    network.register_forward_pre_hook(lambda module, args: runs.append((len(args[0]), module.training)))
    reader = LayerReader(network, ["rnn", "drop"], "guide")

    def read(ids: Tensor) -> None:
        with reader.reading(lambda name, features: features.shape):
            network(ids)
        reader.settle_batch_first()

    if not batch_first:
        words = r"guide layer '(rnn|drop)' \((GRU|Dropout)\) is sequence-first: of one row it gave shape \(5, 1, 8\)"
        with pytest.raises(ValueError, match=words):
            read(square)
        assert network.training
        return
    read(square)
    read(square)
    assert runs == [(5, True), (1, False), (5, True)]
    assert network.training


def test_a_square_batch_through_sequence_first_blocks_of_transformers_is_refused_in_watch() -> None:
    config = XLNetConfig(vocab_size=17, d_model=8, n_layer=2, n_head=2, d_inner=16)
    target, guide = gpt2(), XLNetModel(config)
    batch = {"input_ids": torch.randint(17, (6, 6), generator=torch.Generator().manual_seed(0))}
    loss = GuidanceLoss(target, guide, GuidanceConfig(guide_layers=["layer.*"], guide_shares_tokenizer=True))
    words = r"guide layer 'layer\.\d' \(XLNetLayer\) is sequence-first"
    with pytest.raises(ValueError, match=words), loss.watch(batch) as watched:
        target(**watched.inputs)
    loss = GuidanceLoss(target, guide, GuidanceConfig(guide_shares_tokenizer=True))
    with loss.watch(batch) as watched:
        target(**watched.inputs)
    assert watched.loss is not None


def test_what_a_network_was_called_with_tells_the_first_axis_not_what_the_batch_holds() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.calls = nn.Embedding(17, 8), []

        def forward(self, ids: Tensor, options: dict[str, Any], *, kind: str) -> Tensor:
            self.calls.append((ids.shape, options["scale"].shape, options["scalar"].shape, kind))
            return self.embed(ids) * options["scale"][:, None, None]

    network = Own()
    reader = LayerReader(network, ["embed"], "target")
    options = {"scale": torch.ones(5), "scalar": torch.ones(())}
    with reader.reading(lambda name, features: features.shape):
        network(torch.zeros(5, 5, dtype=torch.int64), options, kind="a")
    reader.settle_batch_first()
    assert network.calls[1] == ((1, 5), (1,), (), "a")
    reader.settle_batch_first()
    assert len(network.calls) == 2


def test_a_network_that_takes_no_single_row_is_said_and_guided(caplog: pytest.LogCaptureFixture) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(17, 8)

        def forward(self, ids: Tensor) -> Tensor:
            first, second = self.embed(ids).view(2, -1, *ids.shape[1:], 8)
            return first - second

    network = Pairs()
    reader = LayerReader(network, ["embed"], "target")
    with reader.reading(lambda name, features: features.shape) as read:
        network(torch.zeros(4, 4, dtype=torch.int64))
    reader.settle_batch_first()
    assert "The target does not run on one row" in caplog.text
    assert read["embed"] == (4, 4, 8)


def test_a_shape_that_is_not_square_settles_it_without_another_run() -> None:
    record = BatchFirst(model := nn.Linear(2, 2), {"": model}, "target")
    record.note_call((torch.ones(3, 2),), {})
    for shape in ((3, 2), (3, 4, 2)):
        record.note("", torch.zeros(shape))
    record.forget_call()

    def never() -> Any:
        raise AssertionError("nothing is open")

    record.settle(never)


def test_nothing_of_a_call_is_kept_once_one_row_of_one_position_has_settled_it() -> None:
    network = nn.Sequential(nn.Embedding(17, 8))
    reader = LayerReader(network, ["0"], "target")
    with reader.reading(lambda name, features: features.shape):
        network(torch.zeros(1, 1, dtype=torch.int64))
    reader.settle_batch_first()
    assert vars(reader._batch_first)["_called"] is None
    assert not reader._batch_first.open
