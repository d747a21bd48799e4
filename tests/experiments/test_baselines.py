"""The baseline's learning rate and training time."""

import math

import pytest

from hf_guidance.experiments.baselines import best_learning_rate, equal_time, longer, rate_name, say_edge
from hf_guidance.experiments.run import Run

RESULTS = [
    {"run": "alone", "seed": 0, "seconds": 10.0, "guide": None},
    {"run": "guided", "seed": 0, "seconds": 25.0, "guide": {"architecture": "G"}},
    {"run": "slower", "seed": 0, "seconds": 30.0, "guide": {"architecture": "G"}},
    {"run": "alone", "seed": 1, "seconds": 14.0, "guide": None},
    {"run": "slower", "seed": 1, "seconds": 42.0, "guide": {"architecture": "G"}},
]
ALONE = Run("alone", 0, lambda: None)


def test_the_baseline_of_equal_time_has_a_tenth_more_time_than_the_slowest_guided_runs_on_average():
    run = equal_time(ALONE, 100, RESULTS)  # (30 + 42) / (10 + 14) = 3
    assert (run.name, run.training) == ("alone_equal_time-330", {"max_steps": 330})
    assert equal_time(ALONE, 100, RESULTS, "guided").training == {"max_steps": 230}  # 25 / 12
    cheap = [*RESULTS[:1], RESULTS[1] | {"seconds": 5.0}]
    assert equal_time(ALONE, 100, cheap).training == {"max_steps": 100}


def test_the_warming_up_of_a_process_is_no_part_of_either_time():
    steady = [result | {"steady_seconds": result["seconds"]} for result in RESULTS]
    steady[0]["steady_seconds"] = 4.0  # ten seconds, of which six were for the start: (30 + 42) / (4 + 14) = 4
    assert equal_time(ALONE, 100, steady).training == {"max_steps": 441}
    assert longer(ALONE, 100, steady).training == {"max_steps": 501}
    assert equal_time(ALONE, 100, [RESULTS[0], *steady[1:]]).training == {"max_steps": 330}, "never of two kinds"


def test_the_longer_baseline_has_twice_the_steps_or_a_quarter_more_time():
    assert longer(ALONE, 100, RESULTS).training == {"max_steps": 376}
    assert longer(ALONE, 100, RESULTS[:1]).training == {"max_steps": 201}


@pytest.mark.parametrize(
    ("best", "rates", "said"), [(3.0, [3.0, 1.0, 2.0], True), (2.0, [3.0, 1.0, 2.0], False), (1.0, [1.0], False)]
)
def test_a_best_rate_at_the_edge_is_said(best, rates, said, capsys):
    say_edge(best, rates)
    assert ("is at the edge of" in capsys.readouterr().out) == said


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


def test_a_run_that_tries_a_rate_is_named_by_it():
    assert rate_name("alone", 0.001) == "alone-lr0.001"
