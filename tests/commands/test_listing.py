"""The layers of a network, as the command lists them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gpt2, llama, t5
from torch import Tensor, nn

from hf_guidance.commands.listing import described, layers_of, names_of
from hf_guidance.commands.main import main
from hf_guidance.commands.networks import example_for, load
from hf_guidance.features.modules import find_modules


def test_blocks_are_one_group_whose_glob_selects_just_them() -> None:
    network = gpt2()
    groups, states = layers_of(network, example_for(network, "gpt2"))
    blocks = next(group for group in groups if group.kind == "GPT2Block")
    count = len(network.transformer.h)
    assert blocks.names == [f"transformer.h.{i}" for i in range(count)]
    assert (blocks.glob, blocks.shapes) == ("transformer.h.*", 2 * [(2, 8, 8)])
    assert list(states) == [f"hidden_states.{i + 1}" for i in range(count)]
    for group in groups:
        assert not group.glob or list(find_modules(network, group.glob)) == group.names


def test_each_hidden_state_is_that_of_the_module_that_makes_it() -> None:
    network = gpt2()
    groups, _ = layers_of(network, example_for(network, "gpt2"))
    made = {group.kind: group.states for group in groups if group.states}
    last = len(network.transformer.h)
    assert made == {"GPT2Block": list(range(1, last)), "LayerNorm": [last]}  # the last norm ends the last state
    resnet = load("timm/resnet18", 0)
    stages, _ = layers_of(resnet, example_for(resnet, "timm/resnet18", 32))
    assert {group.glob: group.states for group in stages if group.states} == {
        "timm_model.act1": [0],
        "timm_model.layer*": [1, 2, 3, 4],
    }
    sides = next(line for line in described("a", {}, stages, {}).splitlines() if "layer1 …" in line)
    assert "(batch, 64, 8, 8) … (batch, 512, 1, 1)" in sides
    assert next(g for g in stages if g.kind == "Conv2d" and len(g.names) == 16).glob == "timm_model.layer*.*.conv*"


def test_a_network_without_hidden_states_lists_its_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    example = {"input_ids": torch.zeros(2, 4).long()}
    groups, states = layers_of(Net(), example)
    assert states == {}
    text = described("net", example, groups, states)
    assert "no hidden states: name the layers by a glob or a type" in text
    assert "2 Linear (blocks.0 … blocks.1)  (batch, 4, 3)  blocks.*" in text


def test_an_encoder_decoder_is_listed_and_a_module_without_rows_has_no_shape() -> None:
    network = t5()
    groups, states = layers_of(network, example_for(network, "t5"))
    assert next(group for group in groups if group.kind == "T5Block").shapes == 2 * [(2, 8, 8)]
    assert states
    positions = next(
        group for group in layers_of(gpt2(), example_for(gpt2(), "gpt2"))[0] if group.names[0].endswith("wpe")
    )
    assert positions.shapes == []  # its output is of one row, for all


def test_the_command_prints_layers_and_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(tmp_path / name) for name in ("a", "b")]
    gpt2().save_pretrained(places[0])
    llama().save_pretrained(places[1])
    assert main(["layers", places[0]]) == 0
    printed = capsys.readouterr().out
    assert f"{places[0]}, for input_ids (2, 8)" in printed
    assert "select: hidden_states" in printed
    assert main(["layers", places[0], "--pairs", places[1], "--layer_mapping", "last_1"]) == 0
    printed = capsys.readouterr().out
    ours, theirs = (names_of(load(p, None), example_for(load(p, None), p), ["hidden_states"], "target") for p in places)
    assert printed.splitlines()[1:] == [f"  {ours[-1]}~{theirs[-1]}"]
    assert main(["layers", places[0], "--layers", "h.0"]) == 1
    assert "--layers says what to pair: name the other network with --pairs" in capsys.readouterr().err
    assert main(["layers", places[0], "--pairs", places[1], "--layer_mapping", "odd"]) == 1
    assert "odd" in capsys.readouterr().err


def test_a_network_that_takes_nothing_of_the_example_is_called_a_network_and_no_guide() -> None:
    class Other(nn.Module):
        def forward(self, audio: Tensor, rate: int) -> Tensor:
            return audio

    words = r"^the network \(Other\) takes \['audio', 'rate'\], .* after its arguments\.$"
    with pytest.raises(ValueError, match=words):
        layers_of(Other(), {"labels": torch.zeros(2, 4)})
