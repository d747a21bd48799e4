"""The learning rate of a baseline is the best of those tried, and one that diverges is none."""

import math
from types import SimpleNamespace

import pytest
import torch
from builders import arguments, gpt2, linear, token_rows
from transformers import default_data_collator

from hf_guidance.experiments.comparison import best_learning_rate, carry_out
from hf_guidance.experiments.run import Run

RUNS = [Run("alone", seed, model=lambda: None) for seed in (0, 1)]


def carry(values):
    """Stand in for training by its results for each learning rate and seed; None: the loss does not stay finite."""

    def train(run):
        rate = run.training["learning_rate"]
        if (value := values[rate][run.seed]) is None:
            raise FloatingPointError("Optimizer step 7 is not finite: the task loss is nan.")
        return {"run": run.name, "seed": run.seed, "settings": {"learning_rate": rate}, "validation": value}

    return train


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 1e-3), (False, 1e-4)])
def test_a_rate_at_which_one_run_diverges_is_the_worst(higher_is_better, best, caplog):
    values = {1e-4: (0.2, 0.3), 1e-3: (0.5, 0.1), 1e-2: (0.9, None), 1e-1: (0.01, math.nan)}
    rate, results = best_learning_rate(RUNS, list(values), carry(values), higher_is_better)
    assert rate == best
    assert [result["validation"] for result in results[:6]] == [0.2, 0.3, 0.5, 0.1, 0.9, None]
    assert "alone-lr0.01 counts as the worst: Optimizer step 7 is not finite" in caplog.text


def test_rates_that_all_diverge_are_an_error():
    with pytest.raises(FloatingPointError, match=r"at any of the rates \[0\.1, 1\.0\]: try lower ones"):
        best_learning_rate(RUNS, [0.1, 1.0], carry({0.1: (None, None), 1.0: (1, None)}), True)


def test_an_unguided_run_stops_at_a_loss_that_is_not_finite(tmp_path):
    def broken():
        network = gpt2()
        torch.nn.init.constant_(network.lm_head.weight, math.nan)
        return network

    rows = {name: token_rows(8) for name in ("train_dataset", "eval_dataset", "test_dataset")}
    nothing = dict.fromkeys(("processing_class", "compute_metrics", "preprocess_logits_for_metrics"))
    task = SimpleNamespace(**rows, **nothing, data_collator=default_data_collator, metric="loss")
    run = Run("alone", 0, model=broken)
    with pytest.raises(FloatingPointError, match="Optimizer step 1 is not finite: the task loss is nan"):
        carry_out(run, task, arguments(tmp_path), linear(), tmp_path, {})
