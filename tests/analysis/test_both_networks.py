"""Both networks on the same batches: their layers, what is refused, and how they are left."""

from __future__ import annotations

import pytest
import torch
from builders import VOCABULARY, gpt2, llama, token_batch
from torch import Tensor, nn

from hf_guidance.analysis.both_networks import BothNetworks, OfBoth, as_they_were, in_words
from hf_guidance.features.reader import LayerReader


def layers_of(a: nn.Module, b: nn.Module, rows: int, least: int = 4) -> OfBoth | None:
    named = [["layer"] if isinstance(network, Random) else ["hidden_states"] for network in (a, b)]
    readers = [LayerReader(a, named[0], "target"), LayerReader(b, named[1], "guide")]
    with torch.no_grad(), as_they_were(a, b, None):
        both = BothNetworks(a, b, readers, "sequence", [0.0, 0.0], least, "auto")
        found = both.layers(token_batch(rows))
    for reader in readers:
        reader.remove()
    assert both.rows == rows
    return found


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(VOCABULARY, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(input_ids) + torch.rand(8)


def broken() -> nn.Module:
    network = gpt2()
    network.transformer.wte.weight.data[:] = torch.nan
    return network


def test_both_networks_give_their_layers_on_the_same_rows() -> None:
    found = layers_of(gpt2(), llama(), 8)
    assert found is not None
    assert [len(side) for side in found] == [2, 3]
    assert {layer.samples for side in found for groups in side.values() for layer in groups} == {8}
    assert layers_of(gpt2(), llama(), 3) is None


def test_a_network_that_is_random_or_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"network a \(Random\) draws random numbers"):
        layers_of(Random(), llama(), 8)
    with pytest.raises(ValueError, match=r"network b \(Random\) draws random numbers"):
        layers_of(llama(), Random(), 8)
    with pytest.raises(ValueError, match=r"layer 'hidden_states\.1' of network a has features that are not finite"):
        layers_of(broken(), llama(), 8)


def test_modes_are_put_back_module_by_module() -> None:
    a, b = gpt2().train(), llama()
    a.transformer.h[0].eval()
    modes = [[module.training for module in network.modules()] for network in (a, b)]
    with as_they_were(a, b, "cpu"):
        assert not any(module.training for network in (a, b) for module in network.modules())
    assert modes == [[module.training for module in network.modules()] for network in (a, b)]
    with pytest.raises(ValueError, match="device is nowhere, which is not there"), as_they_were(a, b, "nowhere"):
        pass


def test_errors_about_guidance_speak_of_the_two_networks() -> None:
    said = "Layer of a 'x' not found; network b has other layers_b."
    with pytest.raises(ValueError, match=said), in_words():
        raise ValueError("target layer 'x' not found; the guide has other guide_layers.")
    with pytest.raises(ValueError, match="untouched"), in_words():
        raise ValueError("untouched")
