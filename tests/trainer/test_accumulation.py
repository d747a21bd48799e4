"""Micro-batches whose similarity is that of all of them: the gradient of the whole, and what stays undisturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, gpt2, linear, llama, t5, token_rows
from torch import Tensor, nn
from trainers import make_trainer, same, trained, weights

from hf_guidance import GuidanceLoss
from hf_guidance.targets import FCNConfig, FCNForImageClassification
from hf_guidance.trainer.accumulation import Accumulated

LENGTHS = (6, 3, 5, 2, 4, 4, 1, 3)


def text(ragged: bool) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor(LENGTHS if ragged else [6] * 8)
    mask = (torch.arange(6) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def cut(batch: dict[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Micro-batches, each no longer than its longest row."""
    parts = [
        dict(zip(batch, values, strict=True)) for values in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]
    return [
        {name: value[:, : int(part["attention_mask"].sum(1).max())] for name, value in part.items()} for part in parts
    ]


def gradients(network: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    return found


@pytest.mark.parametrize("sizes", [(4, 4), (2, 3, 1, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"measure": "debiased_cka", "guidance_reduction": "mean"},
        {"measure": "ridge", "target_layers": ["transformer.h.*"], "guide_layers": ["layers.*.mlp"]},
        {"sample_axis": "token", "max_tokens": 10},
        {"sketch": 16},
    ],
    ids=lambda options: ",".join(options) or "default",
)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_gradient_of_the_micro_batches_is_that_of_the_whole(options: Any, ragged: bool, sizes: Any) -> None:
    target, guide, batch = gpt2().double(), llama().double(), text(ragged)
    loss = GuidanceLoss(target, guide, linear(**options))
    with loss.watch(batch, step=3) as whole:
        target(**whole.inputs)
    whole.loss.backward()
    expected = gradients(target)
    parts = cut(batch, sizes)
    window = Accumulated(loss, parts, step=3)
    for number in range(len(parts)):
        with window.watch(number) as watched:
            target(**watched.inputs)
        assert watched.loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)
        (watched.loss / len(parts)).backward()
    torch.testing.assert_close(gradients(target), expected, rtol=1e-8, atol=1e-12)


def test_dropout_is_the_same_both_times_and_the_random_state_moves_as_without_looking_ahead() -> None:
    target, parts = gpt2(dropout=0.4).train(), cut(text(ragged=False), (4, 4))
    torch.manual_seed(0)
    for part in parts:
        target(**part)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    window, seen = Accumulated(GuidanceLoss(target, llama(), linear()), parts), []
    for number in range(2):
        with window.watch(number) as watched:
            target(**watched.inputs)
        seen.append(watched.similarities["linear_cka"])
    assert seen[0] == seen[1]
    assert torch.equal(torch.get_rng_state(), after)


def test_running_statistics_move_once_for_each_micro_batch() -> None:
    def network() -> FCNForImageClassification:
        torch.manual_seed(0)
        return FCNForImageClassification(FCNConfig(image_size=4, num_channels=1, hidden_size=8, num_hidden_layers=3))

    images = torch.randn(8, 1, 4, 4)
    parts = [{"pixel_values": part} for part in images.split(4)]
    plain, target, guide = network().train(), network().train(), network()
    loss = GuidanceLoss(target, guide, linear())
    for part in parts:
        plain(**part)
    window = Accumulated(loss, parts)
    for number in range(2):
        with window.watch(number) as watched:
            target(**watched.inputs)
    assert len(list(plain.buffers())) > 0
    assert same(weights(plain), weights(target))


def test_a_trainer_that_accumulates_trains_as_one_with_larger_batches(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6, "logging_steps": 1}
    ends = {}
    for name, own in {
        "large": {"per_device_train_batch_size": 8},
        "accumulated": {"gradient_accumulation_steps": 2, "similarity_batch": "accumulated"},
        "local": {"gradient_accumulation_steps": 2},
    }.items():
        settings = {"per_device_train_batch_size": 4, **options, **own}
        ends[name] = trained(make_trainer(tmp_path / name, gpt2(), llama(), **settings))
    large, accumulated, local = (ends[name] for name in ("large", "accumulated", "local"))
    for one, other in zip(accumulated[1], large[1], strict=True):
        compared = [name for name in other if "loss" in name or name.startswith("guidance/")]
        assert any("similarity" in name for name in compared)
        assert [one[name] for name in compared] == pytest.approx([other[name] for name in compared], rel=1e-5)
    torch.testing.assert_close(accumulated[0], large[0], rtol=1e-5, atol=1e-6)
    assert max((local[0][name] - weight).abs().max() for name, weight in large[0].items()) > 1e-4


def test_a_window_at_the_end_of_an_epoch_that_takes_no_step_is_not_mixed_with_the_next(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from token_rows(12)

    settings = {"gradient_accumulation_steps": 2, "similarity_batch": "accumulated", "max_steps": 4}
    trainer = make_trainer(tmp_path, gpt2(), llama(), train_dataset=Stream(), **settings)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer._window is None


def test_columns_that_the_loss_function_takes_do_not_reach_the_target(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = gpt2()

        def forward(self, input_ids: Tensor) -> Any:
            return self.network(input_ids).logits

    def loss(logits: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    layers = {"target_layers": ["network.transformer.h.*"], "remove_unused_columns": False}
    settings = {"gradient_accumulation_steps": 2, "similarity_batch": "accumulated", "max_steps": 2, **layers}
    trainer = make_trainer(tmp_path, Bare(), llama(), compute_loss_func=loss, **settings)
    trainer.train()
    assert trainer.state.global_step == 2


def test_other_vocabularies_are_refused() -> None:
    parts = [{"input_ids": torch.ones(4, 3, dtype=torch.long)}] * 2
    with pytest.raises(ValueError, match="vocabular"):
        Accumulated(GuidanceLoss(gpt2(), llama(vocabulary=40), linear()), parts)


def test_labels_of_several_lengths_are_a_decoders_mask() -> None:
    def part(length: int) -> dict[str, Tensor]:
        ids = torch.randint(1, VOCABULARY, (4, 6))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :length].contiguous()}

    target, parts = t5(), [part(3), part(5)]
    window = Accumulated(GuidanceLoss(target, t5(1), linear()), parts)
    with window.watch(0) as watched:
        target(**watched.inputs)
    assert watched.loss is not None


def test_no_second_forward_where_guidance_weighs_nothing(tmp_path: Path) -> None:
    target, count = gpt2(), []
    target.register_forward_hook(lambda *_: count.append(1))
    settings = {"gradient_accumulation_steps": 2, "similarity_batch": "accumulated", "guidance_stop_step": 1}
    make_trainer(tmp_path, target, llama(), max_steps=3, looks=False, **settings).train()
    assert len(count) == 2 * 3 + 2


BAD = [
    ({"similarity_batch": "accumulated"}, r"gradient_accumulation_steps is 1\. Set it to 2 or more"),
    (
        {"similarity_batch": "accumulated", "gradient_accumulation_steps": 2, "torch_compile": True},
        r"torch_compile draws its own\. Leave one of the two out",
    ),
    (
        {"similarity_batch": "accumulated", "gradient_accumulation_steps": 2, "guide_input": "shuffled"},
        "similarity_batch='accumulated' needs guide_input='batch', got 'shuffled'",
    ),
    (
        {"similarity_batch": "accumulated", "cache_guide": "x", "sample_id_column": "id", "sketch": 4},
        "cache_guide does not work with similarity_batch='accumulated'",
    ),
]


@pytest.mark.parametrize(("settings", "words"), BAD, ids=["one", "compiled", "input", "cache"])
def test_what_cannot_be_accumulated_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, gpt2(), llama(), **settings)


def test_several_lengths_without_a_mask_are_refused() -> None:
    parts = [{"input_ids": torch.ones(4, length, dtype=torch.long)} for length in (3, 5)]
    with pytest.raises(ValueError, match=r"differ in the length of \['input_ids'\] and have no attention_mask"):
        Accumulated(GuidanceLoss(gpt2(), llama(), linear()), parts)
