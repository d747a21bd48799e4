"""The transformer inside a model of another package, found by the package of its class."""

from __future__ import annotations

import pytest
from builders import gpt2, llama
from torch import nn

from hf_guidance.features.inside import is_sentence_transformer, transformer_in


class Model(nn.Sequential):
    """Stands in for a SentenceTransformer, which is an `nn.Sequential` of a transformer's module and others."""


Model.__module__ = "sentence_transformers.base.model"


class Held(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network


def test_a_model_of_sentence_transformers_is_told_by_its_class_and_those_before_it() -> None:
    class Own(Model):
        """A user's own subclass."""

    assert is_sentence_transformer(Own())
    assert not is_sentence_transformer(gpt2())
    assert not is_sentence_transformer(None)


def test_the_one_transformer_is_the_outermost_and_any_other_network_is_itself() -> None:
    network = gpt2()  # which holds another PreTrainedModel
    assert transformer_in(Model(Held(network), nn.Linear(2, 2))) is network
    for other in (network, nn.Linear(2, 2)):
        assert transformer_in(other) is other


def test_no_transformer_and_several_are_errors() -> None:
    with pytest.raises(ValueError, match=r"the guide \(Model\) holds 0 transformers \(none\); expected one"):
        transformer_in(Model(nn.Linear(2, 2)), "guide")
    two = Model(Held(gpt2()), Held(llama()))
    with pytest.raises(
        ValueError, match=r"holds 2 transformers \(0\.model \(GPT2LMHeadModel\), 1\.model \(LlamaModel\)"
    ):
        transformer_in(two)
