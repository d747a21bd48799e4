"""Settings of transformers' Trainer that change how it trains: each works with guidance as without.

Others have their tests in `test_guidance_trainer.py` (label smoothing, bf16, a loss function of one's own, the best
model, `torch.compile`), `test_guidance_mixin.py` (Seq2Seq with generation) and `test_processes.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import NormNet, arguments, gpt2, linear, llama, token_rows
from safetensors.torch import load_file
from torch import nn
from trainers import make_trainer, same, train_logs, trained, weights
from transformers import EarlyStoppingCallback, Trainer

from hf_guidance import GuidanceTrainer


def test_early_stopping_ends_a_guided_run_and_the_best_model_is_loaded(tmp_path: Path) -> None:
    shape = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 2.0}
    data = {"eval_dataset": token_rows(8, seed=1), "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}
    trainer = make_trainer(tmp_path, gpt2(), llama(), **data, **shape, **best)
    logs = trained(trainer)[1]
    evaluated = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    step = min(evaluated, key=evaluated.__getitem__)
    assert trainer.state.global_step == len(logs) == step + 2 < 20
    assert all(log["guidance/weight"] == 1 for log in logs)
    kept = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in kept.items())


def test_a_batch_size_that_trainer_looks_for_is_refused(tmp_path: Path) -> None:
    words = (
        r"auto_find_batch_size changes the batch size, and a similarity depends on it\. Set per_device_train_batch_size"
    )
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, gpt2(), llama(), auto_find_batch_size=True)
    trainer = make_trainer(tmp_path, gpt2(), auto_find_batch_size=True)
    assert len(trained(trainer)[1]) == 3, "without a guide it is Trainer's"


SCHEDULE_FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
RUNS = [
    pytest.param({"neftune_noise_alpha": 5.0}, id="neftune"),
    pytest.param(SCHEDULE_FREE, id="schedule-free", marks=pytest.mark.trainers),
]


@pytest.mark.parametrize("settings", RUNS)
def test_it_changes_the_task_as_without_guidance(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain_end, plain = trained(Trainer(gpt2(), arguments(tmp_path, **settings), train_dataset=token_rows()))
    still_end, still = trained(make_trainer(tmp_path, gpt2(), llama(), guidance_weight=0.0, **settings))
    assert same(still_end, plain_end)
    assert [log["loss"] for log in still] == [log["loss"] for log in plain]
    end, guided = trained(make_trainer(tmp_path, gpt2(), llama(), **settings))
    assert guided[0]["task/loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert all(log["guidance/weight"] == 1 for log in guided)
    assert not same(end, plain_end)


@pytest.mark.trainers
@pytest.mark.parametrize("guided", [True, False])
def test_a_hyperparameter_search_guides_each_of_its_runs(tmp_path: Path, guided: bool) -> None:
    made: list[nn.Module] = []
    runs: list[list[dict[str, float]]] = []

    def model_init() -> nn.Module:
        made.append(gpt2())
        return made[-1]

    def objective(metrics: dict[str, float]) -> float:
        runs.append(train_logs(trainer))
        return metrics["eval_loss"]

    before = weights(guide := llama())
    options = {"model_init": model_init, "train_dataset": token_rows(), "eval_dataset": token_rows(8, seed=1)}
    if guided:
        options |= {"guide": guide, "guidance": linear()}
    trainer = GuidanceTrainer(args=arguments(tmp_path), **options)
    rates = [1e-3, 1e-1]
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        compute_objective=objective,
        n_trials=3,
        direction="minimize",
        backend="optuna",
    )
    assert best.hyperparameters["learning_rate"] in rates
    assert len(runs) == 3
    for logs in runs:
        assert len(logs) == 3
        assert all(("guidance/loss" in log) == guided for log in logs)
    assert same(weights(guide), before)
    assert not any(network._forward_hooks for network in made)


@pytest.mark.parametrize(
    "settings",
    [
        {"guide_batch_norm": "calibrated", "calibration_batches": 2, "target_layers": ["transformer.h.*"]},
        {"cache_guide": "cache", "sample_id_column": "id", "sketch": 8, "measure": "linear_cka"},
    ],
    ids=["calibrated", "cached"],
)
def test_a_guide_is_prepared_for_each_target_that_model_init_makes(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [{**row, "id": i} for i, row in enumerate(token_rows())]
    if "cache_guide" in settings:
        settings = {**settings, "cache_guide": str(tmp_path / "cache")}
    guide = NormNet() if "guide_batch_norm" in settings else llama()
    names = {"guide_layers": ["out"]} if "guide_batch_norm" in settings else {}
    options = {"train_dataset": rows, **settings, **names}
    given = trained(make_trainer(tmp_path, gpt2(), guide, **options))
    trainer = make_trainer(tmp_path, None, guide, model_init=lambda: gpt2(), **options)
    made = [trained(trainer) for _ in range(2)]
    assert all(same(end, given[0]) for end, _ in made)
    assert all(logs == given[1] for _, logs in made)
