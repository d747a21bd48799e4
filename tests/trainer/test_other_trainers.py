"""Guidance in TRL's Trainers, by its default settings, with the real packages; and the table that users read of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from text_trainers import CASES, NAMED, TRAINERS, Case, guide_of, make, model_of, rows_of
from torch import Tensor, nn
from trainers import same, trained, weights

from hf_guidance import GuidanceConfig, GuidanceLoss

trainers = pytest.mark.trainers
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_trainer = pytest.mark.parametrize("case", [Case(name) for name in TRAINERS], ids=TRAINERS)
GENERATES = [Case("GRPO"), Case("RLOO")]
IN_ORDER = {"train_sampling_strategy": "sequential", "optim": "sgd", "lr_scheduler_type": "constant"}
IN_ORDER |= {"max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 0.1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text_trainers")


def batches_with_gradients(network: nn.Module) -> list[dict[str, Tensor]]:
    """The inputs of every forward with gradients from now on, as the network receives them."""
    seen: list[dict[str, Tensor]] = []
    columns = ("input_ids", "attention_mask", "position_ids")

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            seen.append({name: kwargs[name] for name in columns if kwargs.get(name) is not None})

    network.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


@trainers
@every_case
def test_it_trains_guided_by_the_default_settings(case: Case, folder: Path) -> None:
    trainer = make(case, folder)
    batches, before = batches_with_gradients(trainer.model), weights(trainer.model)
    logs = trained(trainer)[1]
    assert not same(before, weights(trainer.model))
    assert [log["guidance/weight"] for log in logs] == [1, 1, 1]
    assert all(math.isfinite(log["guidance/loss"]) and math.isfinite(log["task/loss"]) for log in logs)
    assert all("guidance/skipped_batches" not in log for log in logs)
    assert len(batches) == 3
    target = model_of(case, folder).train()  # as it was before the first step: adapters begin with a product of zero
    loss = GuidanceLoss(target, guide_of(), GuidanceConfig())
    with loss.watch(batches[0]) as watched:
        target(**batches[0], use_cache=False)
    assert watched.loss is not None
    assert logs[0]["guidance/loss"] == pytest.approx(watched.loss.item(), rel=1e-4)


@trainers
@every_case
def test_with_weight_0_losses_and_weights_are_the_plain_trainers_bit_for_bit(case: Case, folder: Path) -> None:
    runs = []
    for options in ({"guided": False}, {"guidance": GuidanceConfig(guidance_weight=0)}):
        end, logs = trained(make(case, folder, **options))
        kept = [{name: value for name, value in log.items() if not re.search("time|per_second", name)} for log in logs]
        for log in kept:
            log.pop("task/loss", None)
        runs.append((end, kept))
    (plain, plain_logs), (ours, our_logs) = runs
    assert same(ours, plain)
    assert our_logs == plain_logs


@trainers
@every_trainer
def test_named_modules_are_guided_too(case: Case, folder: Path) -> None:
    logs = trained(make(case, folder, guidance=GuidanceConfig(**NAMED, log_measures=[])))[1]
    pairs = {f"guidance/similarity/model.layers.{i}~layers.{i}" for i in (0, 1)}
    assert all({name for name in log if name.startswith("guidance/similarity/")} == pairs for log in logs)


@trainers
@every_trainer
def test_evaluation_is_the_tasks_alone(case: Case, folder: Path) -> None:
    found = []
    for options in ({"guided": False}, {}):
        trainer = make(case, folder, per_device_eval_batch_size=8, **options)
        trainer.eval_dataset = trainer.train_dataset
        found.append({k: v for k, v in trainer.evaluate().items() if not re.search("time|per_second", k)})
    assert found[0] == found[1]
    assert "eval_loss" in found[1]


@trainers
@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_of_pairs_two_are_enough_and_one_is_too_few(name: str, folder: Path) -> None:
    case = Case(name)
    logs = trained(make(case, folder, per_device_train_batch_size=2))[1]
    assert [log["guidance/weight"] for log in logs] == [1, 1, 1]
    words = (
        r"per_device_train_batch_size is 1, of which the data collator makes 2 samples, but debiased_cka needs at lea"
    )
    with pytest.raises(ValueError, match=words):
        make(case, folder, per_device_train_batch_size=1)
    config = GuidanceConfig(guide_rows=6)
    assert trained(make(case, folder, per_device_train_batch_size=3, guidance=config))[1][0]["guidance/weight"] == 1


@trainers
@pytest.mark.parametrize("case", [CASES["SFT, packed"], CASES["SFT, padding-free"]], ids=["packed", "padding-free"])
def test_documents_in_one_row_are_not_taken_for_one_sample_too_few(case: Case, folder: Path) -> None:
    batch = 1 if "packing" in case.settings else 3
    make(case, folder, per_device_train_batch_size=batch)


@trainers
@pytest.mark.parametrize("case", GENERATES, ids=[case.trainer for case in GENERATES])
@pytest.mark.parametrize(
    "settings",
    [
        {"similarity_batch": "accumulated"},
        {"sample_axis": "within"},
        {"guide_input": "prealign_noise", "prealign_steps": 1},
        {"eval_similarity": True},
        {"cache_guide": "cache", "sample_id_column": "id", "sketch": 64},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_needs_the_batches_beforehand_is_refused_where_they_are_generated(
    case: Case, folder: Path, settings: dict[str, Any]
) -> None:
    name, value = next(iter(settings.items()))
    words = rf"Guided{case.trainer}Trainer makes its batches itself, in each step, .* {name}={value!r} needs them as .*"
    with pytest.raises(ValueError, match=words + "leave it out"):
        make(case, folder, guidance=GuidanceConfig(**settings))


@trainers
@pytest.mark.parametrize("case", [CASES["SFT"], CASES["SFT, LoRA"]], ids=["SFT", "SFT, LoRA"])
def test_guidance_counts_once_whatever_the_accumulation(case: Case, folder: Path) -> None:
    rows, runs = rows_of(case, 8), []
    for steps in (1, 2, 4):
        data = type(rows).from_list(list(rows) * steps)
        trainer = make(case, folder, gradient_accumulation_steps=steps, train_dataset=data, **IN_ORDER)
        end, (log,) = trained(trainer)
        runs.append((end, {name: log[name] for name in ("loss", "task/loss", "guidance/loss", "grad_norm")}))
    for end, log in runs[1:]:
        assert log == pytest.approx(runs[0][1], rel=1e-5)
        torch.testing.assert_close(end, runs[0][0], rtol=1e-5, atol=1e-6)
