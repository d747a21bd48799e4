"""The baseline's learning rate and training time."""

import pytest

from hf_guidance.experiments.baselines import equal_time, longer, say_edge
from hf_guidance.experiments.run import Run

RESULTS = [
    {"run": "alone", "seed": 0, "seconds": 10.0, "guide": None},
    {"run": "guided", "seed": 0, "seconds": 25.0, "guide": {"architecture": "G"}},
    {"run": "slower", "seed": 0, "seconds": 30.0, "guide": {"architecture": "G"}},
    {"run": "slower", "seed": 1, "seconds": 90.0, "guide": {"architecture": "G"}},
]
ALONE = Run("alone", 0, lambda: None)


def test_the_baseline_of_equal_time_has_a_tenth_more_time_than_the_slowest_guided_run_of_its_seed():
    run = equal_time(ALONE, 100, RESULTS)
    assert (run.name, run.training) == ("alone_equal_time-330", {"max_steps": 330})
    cheap = [*RESULTS[:1], RESULTS[1] | {"seconds": 5.0}]
    assert equal_time(ALONE, 100, cheap).training == {"max_steps": 100}


def test_the_longer_baseline_has_twice_the_steps_or_a_quarter_more_time():
    assert longer(ALONE, 100, RESULTS).training == {"max_steps": 376}
    assert longer(ALONE, 100, RESULTS[:1]).training == {"max_steps": 201}


@pytest.mark.parametrize(
    ("best", "rates", "said"), [(3.0, [3.0, 1.0, 2.0], True), (2.0, [3.0, 1.0, 2.0], False), (1.0, [1.0], False)]
)
def test_a_best_rate_at_the_edge_is_said(best, rates, said, capsys):
    say_edge(best, rates)
    assert ("is at the edge of" in capsys.readouterr().out) == said
