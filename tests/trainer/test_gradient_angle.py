"""The gradients of task and guidance beside each other, at the start and at logged steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gpt2, gradients, llama
from torch import Tensor, nn
from trainers import make_trainer, same, train_logs, weights

from hf_guidance import GuidanceLoss
from hf_guidance.trainer.gradient_angle import Gradients, compare_gradients

NAMES = ("guidance/gradient_ratio", "guidance/gradient_cosine")


def test_ratio_and_cosine_of_two_losses_in_the_weights_that_guidance_reaches() -> None:
    layer, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[8.0, -6.0]])
    task, guidance = layer(x).sum() + other(x).sum(), layer(x + y).sum()
    found = compare_gradients(task, guidance, nn.ModuleList([layer, other]))
    assert isinstance(found, Gradients)
    assert found.ratio == pytest.approx(125**0.5 / 5)  # x and y are at right angles, 5 and 10 long
    assert found.cosine == pytest.approx(25 / (125**0.5 * 5))
    against = compare_gradients(task, -task, layer)
    assert against == pytest.approx((1.0, -1.0))


def test_a_scale_that_overflows_is_followed_by_the_next_one() -> None:
    layer = nn.Linear(3, 2)
    task, guidance = layer(torch.ones(1, 3)).sum(), 3 * layer(torch.ones(1, 3)).sum()
    for scales in ([1.0], [2.0**127, 1.0], [float("inf"), 256.0]):
        assert compare_gradients(task, guidance, layer, scales) == pytest.approx((3, 1), rel=1e-6)
    assert compare_gradients(task, guidance, layer, [float("inf")]) == "it is not finite"
    assert layer.weight.grad is None


def test_why_there_is_no_ratio() -> None:
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    both = nn.ModuleList([layer, other])
    task, guidance = layer(torch.ones(1, 3)).sum(), other(torch.ones(1, 3)).sum()
    assert compare_gradients(task, guidance, both) == "the task has no gradient there"
    calls: list[Tensor] = []
    for weight in both.parameters():
        weight.register_hook(calls.append)
    assert compare_gradients(task, guidance, both) == "all weights have hooks"
    assert calls == []
    (layer.weight.sum() + guidance).backward()
    assert compare_gradients(task, guidance, nn.Linear(3, 2)) == "the task has no gradient there"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_steps_have_ratio_and_cosine_at_their_weight_and_train_the_same(
    tmp_path: Path, accumulation: int
) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "guidance_weight": 0.7, "max_steps": 4}
    settings |= {"logging_steps": 2, "guidance_schedule": "linear"}
    plain, ours = (make_trainer(tmp_path, gpt2(), llama(), log_gradients=on, **settings) for on in (False, True))
    kept: list[Any] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            kept.append((weights(module), {name: kwargs[name] for name in ("input_ids", "labels")}))

    ours.model.register_forward_pre_hook(keep, with_kwargs=True)
    for trainer in (plain, ours):
        trainer.train()
    assert same(weights(plain.model), weights(ours.model))
    assert not any(name in log for log in train_logs(plain) for name in NAMES)
    logs = train_logs(ours)
    assert len(logs) == 2
    before, batch = kept[accumulation]  # the first forward of the second step, which is the first that is logged
    copy = gpt2()
    copy.load_state_dict(before)
    loss = GuidanceLoss(copy, llama(), ours.guidance)
    loss.total_steps = 4
    with loss.watch(batch, step=1) as watched:
        outputs = copy(**watched.inputs)
    assert watched.loss is not None
    guided = gradients(copy, watched.weights.guidance * watched.loss)
    task = gradients(copy, copy(**batch)[0])
    assert outputs[0].isfinite()
    reached = [i for i, slope in enumerate(guided) if slope.any()]
    one, other = (torch.cat([found[i].flatten() for i in reached]) for found in (guided, task))
    assert logs[0][NAMES[0]] == pytest.approx(float(one.norm() / other.norm()), rel=1e-4)
    assert logs[0][NAMES[1]] == pytest.approx(float(one @ other / (one.norm() * other.norm())), abs=1e-4)


def test_where_nothing_can_be_measured_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), log_gradients=True)
    monkeypatch.setattr("hf_guidance.trainer.gradient_angle._why_not", lambda *args: "FSDP")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("log_gradients measures nothing here: FSDP") == 1
    assert not any(name in log for log in train_logs(trainer) for name in NAMES)
