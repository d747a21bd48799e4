"""The plan of a recipe: its runs, which of them are done, and how long the rest takes."""

import json

import pytest

from hf_guidance.experiments import progress
from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.progress import Progress, duration, in_lines, planned_runs
from hf_guidance.experiments.run import Run

STEPS = 10


def runs(seed):
    return [
        Run("alone", seed, lambda: None),
        Run("guide_itself", seed, lambda: None, training={"max_steps": 30}),
        Run("guided", seed, lambda: None, guide=lambda: None),
    ]


def plan(folder, **flags):
    return planned_runs(RecipeArguments(**{"seeds": [0, 1], **flags}), runs, STEPS, folder)


def finish(place, record="{}"):
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").write_text(record)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves on."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_plan_has_the_search_before_all_runs_and_the_longer_baselines_after_them(tmp_path):
    flags = {"learning_rates": [0.1, 0.2, 0.1], "search_seeds": [7], "equal_time_baseline": True}
    found = [(str(run.place.relative_to(tmp_path)), run.kind, run.steps, run.guided) for run in plan(tmp_path, **flags)]
    of_seed = [("alone", STEPS, False), ("guide_itself", 30, False), ("guided", STEPS, True)]
    assert found == [
        ("seed-7/alone-lr0.1", "alone", STEPS, False),
        ("seed-7/alone-lr0.2", "alone", STEPS, False),
        *((f"seed-{seed}/{name}", name, steps, guided) for seed in (0, 1) for name, steps, guided in of_seed),
        ("seed-0/alone_equal_time", "alone", None, False),
        ("seed-1/alone_equal_time", "alone", None, False),
    ]


def test_the_plan_in_lines():
    recipe = RecipeArguments(seeds=[0, 1], learning_rates=[0.1, 0.2], search_seeds=[7, 8], longer_baseline=True)
    assert in_lines(recipe, runs(0), STEPS) == [
        "3 runs × 2 seeds (0 1) × 10 steps: alone, guide_itself (30 steps), guided",
        "before them, 4 runs of alone choose the rate: 0.1, 0.2",
        "after them, alone_longer for each seed, whose steps follow from the times of the guided runs",
    ]
    assert in_lines(RecipeArguments(), runs(0)[:1], STEPS) == ["1 run × 1 seed (0) × 10 steps: alone"]


def test_what_is_done_already_and_where_it_resumes_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(
        progress, "last_complete_checkpoint", lambda place: "x/checkpoint-4" if place.name == "guided" else None
    )
    found = plan(tmp_path, equal_time_baseline=True)
    first = "seed-0/guided resumes at step 4 of 10"
    assert Progress(found).begin(tmp_path) == (
        f"none of these 8 runs is done already; {first}; results go to {tmp_path}"
    )
    for name in ("alone", "guided", "guide_itself", "alone_equal_time-17"):
        finish(tmp_path / "seed-0" / name)
    assert Progress(found).begin(tmp_path) == (
        f"4 of these 8 runs are done already; {first.replace('0', '1', 1)}; results go to {tmp_path}"
    )
    for run in found:
        finish(run.place.with_name("alone_equal_time-9") if run.steps is None else run.place)
    assert Progress(found).begin(tmp_path) == f"all of these 8 runs are done already, and are read from {tmp_path}"


def test_one_run_is_said_in_the_singular(tmp_path):
    found = planned_runs(RecipeArguments(), lambda seed: runs(seed)[:1], STEPS, tmp_path)
    assert Progress(found).begin(tmp_path) == f"this run is not done yet; results go to {tmp_path}"
    finish(tmp_path / "seed-0" / "alone")
    assert Progress(found).begin(tmp_path) == f"this run is done already, and is read from {tmp_path}"


def test_other_versions_of_finished_runs_are_said_in_one_line(tmp_path, monkeypatch):
    now = {"torch": "2.9", "transformers": "5.1", "hf_guidance": "0.2", "device": "cpu: C"}
    monkeypatch.setattr(progress, "environment", lambda: now)
    found = plan(tmp_path, equal_time_baseline=True)
    made = {"alone": now, "guided": now | {"torch": "2.8"}, "guide_itself": {"torch": "2.7", "transformers": "5.1"}}
    for name, versions in made.items():
        finish(tmp_path / "seed-0" / name, json.dumps({"environment": versions | {"device": "cuda: D"}}))
    assert Progress(found).begin(tmp_path).splitlines()[1:] == [
        "2 finished runs were made by other versions: torch 2.7 and 2.8 (now 2.9)"
    ]
    finish(tmp_path / "seed-0" / "alone_equal_time-17", json.dumps({"environment": now | {"hf_guidance": "0.1"}}))
    for name in ("guided", "guide_itself"):
        finish(tmp_path / "seed-0" / name)
    assert Progress(found).begin(tmp_path).splitlines()[1:] == [
        "1 finished run was made by other versions: hf_guidance 0.1 (now 0.2)"
    ]


def test_after_each_run_that_is_trained_the_time_left_is_said(tmp_path, clock, capsys):
    found = Progress(plan(tmp_path, equal_time_baseline=True))
    assert (str(found), found.seconds_left()) == ("0 of 8 runs done", 0.0)
    seconds = {"alone": 10.0, "guide_itself": 60.0, "guided": 100.0}
    for name, taken in seconds.items():
        with found.running(tmp_path / "seed-0" / name):
            clock[0] += taken
            finish(tmp_path / "seed-0" / name)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1 of 8 runs done, about ")
    # the same runs of the other seed, and two baselines that last 1.1 times as long as the guided run
    assert found.seconds_left() == pytest.approx(170 + 2 * 110)
    assert said[2] == "3 of 8 runs done, about 6 min left"
    with found.running(tmp_path / "seed-0" / "alone"):  # is read
        clock[0] += 1000
    assert capsys.readouterr().out == ""
    with found.running(tmp_path / "seed-0" / "alone_equal_time-23"):
        clock[0] += 1
    assert capsys.readouterr().out == "4 of 8 runs done, about 5 min left\n"


def test_steps_before_a_checkpoint_are_not_counted(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(progress, "last_complete_checkpoint", lambda place: "checkpoint-5")
    found = Progress(planned_runs(RecipeArguments(seeds=[0, 1]), lambda seed: runs(seed)[:1], STEPS, tmp_path))
    with found.running(tmp_path / "seed-0" / "alone"):
        clock[0] += 10
    assert found.seconds_left() == 10  # five steps of two seconds


def test_a_run_that_diverges_or_is_left_out_is_not_waited_for(tmp_path, capsys):
    found = Progress(plan(tmp_path))
    found.leave_out(tmp_path, "guided")
    found.leave_out(tmp_path / "elsewhere", "alone")
    with pytest.raises(FloatingPointError), found.running(tmp_path / "seed-0" / "alone"):
        raise FloatingPointError
    assert capsys.readouterr().out == ""
    assert str(found) == "1 of 4 runs done"
    with found.running(tmp_path / "seed-9" / "unplanned"):
        pass
    assert capsys.readouterr().out == ""


def test_another_process_prints_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(progress.PartialState()), "is_main_process", property(lambda self: False))
    with Progress(plan(tmp_path)).running(tmp_path / "seed-0" / "alone"):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (40, "40 s"), (840, "14 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words
