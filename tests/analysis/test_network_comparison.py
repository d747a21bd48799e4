"""Two networks over a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import VOCABULARY, gpt2, llama, t5
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetModel

from hf_guidance.analysis import compare
from hf_guidance.similarity import MEASURES, debiased_cka, get_measure


def rows(count: int = 80, length: int = 6) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (length,), generator=random)} for _ in range(count)]


def states(network: nn.Module, data: list[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        outputs = network.eval()(input_ids=torch.stack([row["input_ids"] for row in data]), output_hidden_states=True)
    return list(outputs.hidden_states[1:])


def hooks_of_ours(network: nn.Module) -> list[Any]:
    """Hooks of this package; those of transformers stay."""
    hooks = [h for m in network.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if "hf_guidance" in getattr(getattr(hook, "func", hook), "__module__", "")]


def test_the_values_are_those_of_the_hidden_states() -> None:
    a, b, data = gpt2(), llama(), rows(40)
    found = compare(a, b, data, batch_size=40)
    ours, theirs = states(a, data), states(b, data)
    expected = [[debiased_cka(x.double(), y.double()).item() for y in theirs] for x in ours]
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.layers_a == [f"hidden_states.{i + 1}" for i in range(len(ours))]
    assert (found.samples, found.batches, found.errors, found.measure) == (40, 1, None, "debiased_cka")


def test_a_network_is_one_with_itself_and_stays_as_it_was() -> None:
    network = gpt2(dropout=0.5).train()
    for axis in ("sequence", "token", "within"):
        found = compare(network, network, rows(), sample_axis=axis)
        np.testing.assert_allclose(found.values.diagonal(), 1, atol=1e-6)
        assert found.errors is None or found.errors.shape == found.values.shape
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not hooks_of_ours(network)


@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
def test_padding_does_not_count(axis: str) -> None:
    generator = torch.Generator().manual_seed(1)
    data = []
    for row in rows(32, 9):
        mask = torch.arange(9) < torch.randint(5, 10, (1,), generator=generator)
        data.append({"input_ids": torch.where(mask, row["input_ids"], 0), "attention_mask": mask.long()})
    more = [
        {
            "input_ids": torch.cat([torch.full((4,), 3), row["input_ids"], torch.full((5,), 3)]),
            "attention_mask": torch.cat([torch.zeros(4), row["attention_mask"], torch.zeros(5)]).long(),
        }
        for row in data
    ]
    values = [compare(llama(), llama(2), given, sample_axis=axis, batch_size=16).values for given in (data, more)]
    np.testing.assert_allclose(values[0], values[1], atol=2e-4 if axis == "sequence" else 2e-5)


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - {"linear_cka", "debiased_cka"}))
def test_other_measures_compare_one_sample_at_once(measure: str) -> None:
    a, b, data = gpt2(), llama(), rows(50)
    found = compare(a, b, data, measure=measure, samples=40, batch_size=8)
    assert (found.samples, found.batches) == (40, 1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()[:40]
    chosen = [data[i] for i in order]
    expected = [[float(get_measure(measure)(x, y)) for y in states(b, chosen)] for x in states(a, chosen)]
    np.testing.assert_allclose(found.values, expected, atol=1e-4)


def test_data_may_be_rows_a_stream_or_batches() -> None:
    a, b, data = gpt2(), llama(), rows(64)
    whole = compare(a, b, data, batch_size=64).values
    loader = DataLoader(data, batch_size=64)  # type: ignore[arg-type]
    np.testing.assert_allclose(compare(a, b, loader).values, whole, atol=1e-6)
    stream = compare(a, b, iter(data), samples=64, batch_size=64)
    np.testing.assert_allclose(stream.values, whole, atol=1e-6)
    assert compare(a, b, loader, samples=10).samples == 10
    assert compare(a, b, data, samples=10).samples == 10
    assert compare(a, b, rows(66), batch_size=32).samples == 64  # the last two rows are too few for a batch


def test_named_layers_and_columns_of_its_own_are_compared() -> None:
    a, b, data = gpt2(), llama(), rows(16)
    own = [{**row, "guide_input_ids": row["input_ids"].flip(0)} for row in data]
    found = compare(a, b, own, layers_a=["transformer.h.*.mlp"], layers_b=["layers.1"], batch_size=16)
    assert (found.layers_a, found.layers_b) == (
        [f"transformer.h.{i}.mlp" for i in range(len(a.transformer.h))],
        ["layers.1"],
    )
    flipped = compare(b, b, own, layers_a=["layers.1"], layers_b=["layers.1"], batch_size=16).values
    assert flipped[0, 0] < 0.99  # with the same input it is 1


def test_tokens_of_few_rows_at_once_say_the_same_as_those_of_many() -> None:
    a, b, data = gpt2(), llama(), rows(256, 12)
    few, many = (compare(a, b, data, sample_axis="token", batch_size=size) for size in (8, 64))
    assert few.errors is not None
    assert (abs(few.values - many.values) <= 4 * few.errors).all()
    with pytest.raises(ValueError, match="no batch of the data has the 4 rows that debiased_cka needs"):
        compare(a, b, data, sample_axis="token", batch_size=3)


def of_two_lengths() -> list[dict[str, Tensor]]:
    return [{**row, "guide_input_ids": row["input_ids"][:-2]} for row in rows()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers_a": ["h.9"]}, r"^Layer of a 'h\.9' not found; network a has"),
        ({"layers_b": ["h.9"]}, r"^Layer of b 'h\.9' not found; network b has"),
        (
            {"samples": 3},
            r"no batch of the data has the 4 samples that debiased_cka needs \(3 rows were read, with samples=3 and",
        ),
        ({"data": iter(rows())}, r"the data \(list_iterator\) have no length.*give the number of samples"),
        (
            {"data": [{"input_ids": torch.zeros(n).long()} for n in (3, 4, 5, 6)]},
            "do not make a batch.*Pass a collator",
        ),
        ({"b": ResNetModel(ResNetConfig(depths=[1], hidden_sizes=[8]))}, r"^Network b \(ResNetModel\) does not run on"),
        ({"b": nn.Linear}, "b is the class Linear"),
        ({"sample_axis": "row"}, "sample_axis is 'row'; possible are sequence, token, within"),
        ({"measure": "cka"}, "Unknown measure 'cka'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "nowhere"}, "device is nowhere, which is not there"),
        ({"data": {"train": rows()}}, "the data are a dict with train; expected rows: choose a split"),
        ({"data": DataLoader([(1, 2)], batch_size=1)}, "the DataLoader gives a list; expected batches as dicts"),
        (
            {"a": t5()},
            r"^Network a \(T5ForCond.*does not run on input_ids.*: add decoder_input_ids, or pass its encoder",
        ),
        ({"samples": 10.5}, "samples 10.5; expected whole numbers of at least 1"),
        ({"batch_size": "3"}, "batch_size is '3' and samples None; expected whole numbers"),
        (
            {"data": of_two_lengths(), "sample_axis": "token"},
            r"the layer of a gives 192 samples \(6 positions a row\) and the layer of b 128 \(4\)",
        ),
        ({"data": of_two_lengths(), "sample_axis": "within"}, r"both layers need the same positions"),
        ({"measure": "linear_cka", "sample_axis": "within"}, "use debiased_cka"),
    ],
)
def test_what_cannot_be_compared_is_said(changes: dict[str, Any], said: str) -> None:
    given = {"a": gpt2(), "b": llama(), "data": rows(), **changes}
    with pytest.raises(ValueError, match=f"(?s){said}"):
        compare(**given)
    for network in (given["a"], given["b"]):
        if isinstance(network, nn.Module):
            assert not hooks_of_ours(network)


def test_the_data_of_an_encoder_decoder_are_its_own() -> None:
    data = [{**row, "labels": row["input_ids"]} for row in rows(16)]
    found = compare(t5(0), t5(1), data, batch_size=16)
    assert found.values.shape == (2, 2)
    assert np.isfinite(found.values).all()
