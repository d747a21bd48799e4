"""Which hidden states are layers, told by what the blocks of a network take and give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_guidance.features.hidden_states import Blocks, first_tensor, last_tensor
from hf_guidance.features.reader import states_of


class Stack(nn.Module):
    """Three blocks, and the hidden states that a way of collecting them returns."""

    def __init__(self, collects: str) -> None:
        super().__init__()
        self.collects = collects
        self.embed, self.norm = nn.ModuleList([nn.Linear(4, 4)]), nn.LayerNorm(4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Any:
        x = self.embed[0](x)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        normed = self.norm(x)
        second = [normed]  # the input of a second stack
        for block in self.more:
            second.append(block(second[-1]))
        for head in self.heads:
            head(x)
        return {
            "embeddings and layers": states,
            "last one normed": [*states[:-1], normed],
            "layers": states[1:],
            "layers, last one normed": [*states[1:-1], normed],
            "last one twice": [*states[1:], normed],
            "embeddings, last one twice": [*states, normed],
            "embeddings twice": [states[0], *states],
            "stages together": [states[0], (states[0], states[1]), (states[1], states[2], states[3])],
            "two stacks": [*states, *second],
            "copies of all but the last": [*(state.clone() for state in states[:-1]), x],
            "copies": [state.clone() for state in states],
            "copies of layers": [state.clone() for state in states[1:]],
        }[self.collects]


@pytest.mark.parametrize(
    ("collects", "layers"),
    [
        ("embeddings and layers", [1, 2, 3]),
        ("last one normed", [1, 2, 3]),
        ("layers", [0, 1, 2]),
        ("layers, last one normed", [0, 1, 2]),
        ("last one twice", [0, 1, 2]),
        ("embeddings, last one twice", [1, 2, 3]),
        ("embeddings twice", [2, 3, 4]),
        ("stages together", [1, 2]),
        ("two stacks", [1, 2, 3, 5, 6, 7, 8, 9]),
        ("copies of all but the last", [1, 2, 3]),
        ("copies", [1, 2, 3]),
        ("copies of layers", [0, 1, 2]),
    ],
)
def test_each_layer_is_named_once_and_the_embeddings_never(collects: str, layers: list[int]) -> None:
    network = Stack(collects)
    blocks = Blocks(network)
    blocks.attach()
    network(torch.randn(2, 4))
    blocks.forget()
    states = network(torch.randn(2, 4))
    assert list(blocks.layers_among(states)) == layers
    blocks.remove()
    assert not any(module._forward_hooks for module in network.modules())


def test_features_are_the_first_tensor_of_an_output_and_states_those_of_its_kind() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert first_tensor((None, (x, y))) is x
    assert first_tensor({"a": x}) is x
    assert last_tensor((x, (x, y))) is y
    assert last_tensor(None) is None
    assert states_of({"decoder_hidden_states": (x, y), "encoder_hidden_states": (y,)}, "hidden_states") == (x, y)
    assert states_of({"encoder_hidden_states": (y,)}, "encoder_hidden_states") == (y,)
    assert states_of({}, "hidden_states") is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Sequence(nn.Module):
    """A network of one's own: its blocks are an `nn.Sequential`, its stem another one."""

    def __init__(self, embeddings: bool) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> list[Tensor]:
        states = [self.stem(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states if self.embeddings else states[1:]


@pytest.mark.parametrize(("embeddings", "layers"), [(True, [1, 2, 3]), (False, [0, 1, 2])])
def test_blocks_in_a_sequential_are_watched_where_there_is_no_module_list(embeddings, layers):
    network = Sequence(embeddings)
    blocks = Blocks(network)
    blocks.attach()
    assert blocks.layers_among(network(torch.ones(2, 4))) == layers
    blocks.remove()
