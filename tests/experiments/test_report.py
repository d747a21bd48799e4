"""Tables of matched runs against numbers worked out by hand."""

import pytest

from hf_guidance.experiments.report import comparison_rows, markdown_table, value_at, versions_of


def result(run, seed, values, seconds, guided=False):
    """A run validated every 10 steps, whose training took equal time in every step."""
    curve = [
        {"step": 10 * (i + 1), "value": value, "loss": 0.0, "seconds": seconds * (i + 1) / len(values)}
        for i, value in enumerate(values)
    ]
    return {
        "run": run,
        "seed": seed,
        "steps": 10 * len(values),
        "seconds": seconds,
        "curve": curve,
        "validation": values[-1],
        "test": {"accuracy": values[-1] - 0.01},
        "guide": {"architecture": "G"} if guided else None,
    }


RESULTS = [
    result("alone", 0, [0.1, 0.2], 2.0),
    result("untrained_guide", 0, [0.3, 0.5], 5.0, guided=True),
    result("alone", 1, [0.1, 0.4], 2.0),
    result("untrained_guide", 1, [0.4, 0.7], 5.0, guided=True),
]
LONGER = [
    result("alone_longer", 0, [0.1, 0.2, 0.25, 0.3, 0.35, 0.36], 6.0),
    result("alone_longer", 1, [0.1, 0.4, 0.45, 0.5, 0.55, 0.56], 6.0),
]


def test_rows_are_means_and_sample_deviations_over_the_seeds():
    alone, guided = comparison_rows(RESULTS)
    assert alone["seeds"] == guided["seeds"] == [0, 1]
    assert alone["validation"] == pytest.approx((0.3, 0.02**0.5))
    assert guided["validation"] == pytest.approx((0.6, 0.02**0.5))
    assert guided["test"] == pytest.approx((0.59, 0.02**0.5))
    assert (alone["seconds"], guided["seconds"]) == (2.0, 5.0)


def test_the_longer_baseline_is_read_at_twice_the_steps_and_at_the_guided_runs_time():
    rows = {row["run"]: row for row in comparison_rows(RESULTS + LONGER)}
    assert list(rows) == ["alone", "alone, twice the steps", "alone, equal time", "untrained_guide"]
    assert rows["alone, twice the steps"]["validation"][0] == pytest.approx((0.3 + 0.5) / 2)
    assert rows["alone, twice the steps"]["steps"] == 40
    assert rows["alone, equal time"]["validation"][0] == pytest.approx((0.35 + 0.55) / 2)  # 5 s of 1 s per 10 steps
    assert rows["alone, equal time"]["steps"] == 50


def test_value_at_is_the_first_one_not_before_the_limit():
    run = LONGER[0]
    assert value_at(run, step=31) == 0.3
    assert value_at(run, step=61) is None
    assert value_at(run, seconds=4.5) == 0.35
    assert value_at(run, seconds=6.3) == 0.36  # measured times differ a little
    assert value_at(run, seconds=6.4) is None


def test_the_table_lines_up_and_shows_what_is_missing_as_a_dash():
    lines = markdown_table(comparison_rows(RESULTS + LONGER), "accuracy", percent=True).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "| 30.00 ± 14.14 % " in lines[2]
    assert lines[3].startswith("| alone, twice the steps | 0 1   | 40    | 4 s")
    assert lines[3].rstrip(" |").endswith("–")
    single = markdown_table(comparison_rows(RESULTS[:2]), "perplexity", percent=False)
    assert "0.50" in single
    assert "±" not in single


def test_the_versions_of_runs_are_each_named_once():
    made = [{"torch": "2.9", "device": "cpu: C"}, {"torch": "2.8", "hf_guidance": "0.1"}, {"torch": "2.9"}]
    assert versions_of([{"environment": own} for own in made]) == {"torch": ["2.9", "2.8"], "hf_guidance": ["0.1"]}
    assert versions_of([{}]) == {}
