"""Optimizer step → weights of guidance and task."""

from typing import Any

import pytest

from hf_guidance.schedule import SCHEDULES, Weights, check_schedule, check_warmup, make_schedule


def guidance(name: str, steps: int, **options: Any) -> list[float]:
    """The guidance weight over the first steps."""
    schedule = make_schedule(name, 2.0, **options)
    return [schedule(step).guidance for step in range(steps)]


def test_constant_is_constant() -> None:
    schedule = make_schedule("constant", 2.0)
    assert {schedule(step) for step in (0, 1, 10**9)} == {Weights(2.0, 1.0)}


def test_constant_stops_at_its_stop_step_and_the_task_goes_on() -> None:
    schedule = make_schedule("constant", 2.0, stop_step=3, total_steps=10)
    assert [schedule(step) for step in range(5)] == [(2.0, 1.0)] * 3 + [(0.0, 1.0)] * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [2, 1.5, 1, 0.5, 0, 0]),
        ("cosine", [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0]),  # 1 + cos(π k / 4)
    ],
)
@pytest.mark.parametrize("end", [{"stop_step": 4}, {"total_steps": 4}, {"stop_step": 4, "total_steps": 100}])
def test_decay_starts_at_the_weight_and_ends_at_the_stop_step_or_the_end(
    name: str, expected: list[float], end: dict[str, int]
) -> None:
    assert guidance(name, 6, **end) == pytest.approx(expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_prealignment_trains_on_guidance_alone_at_full_weight(name: str) -> None:
    schedule = make_schedule(name, 2.0, prealign_steps=3, total_steps=10)
    assert [schedule(step) for step in range(3)] == [Weights(2.0, 0.0)] * 3
    assert all(schedule(step).task == 1 for step in range(3, 12))
    assert schedule(3).guidance == 2.0


def test_decay_begins_after_prealignment() -> None:
    assert guidance("linear", 7, prealign_steps=2, stop_step=6) == pytest.approx([2, 2, 2, 1.5, 1, 0.5, 0])


def test_guidance_may_stop_when_prealignment_ends() -> None:
    schedule = make_schedule("linear", 2.0, prealign_steps=2, stop_step=2)
    assert [schedule(step) for step in range(4)] == [(2.0, 0.0)] * 2 + [(0.0, 1.0)] * 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_leaves_the_range_from_0_to_the_weight(name: str) -> None:
    values = guidance(name, 60, total_steps=50, prealign_steps=7)
    assert values == sorted(values, reverse=True)
    assert 0 <= values[-1] <= values[0] == 2


def test_every_so_manieth_step_is_guided_and_all_steps_of_prealignment_are() -> None:
    assert guidance("constant", 8, every=3) == [2, 0, 0, 2, 0, 0, 2, 0]
    assert guidance("constant", 8, every=3, prealign_steps=2, stop_step=6) == [2, 2, 0, 2, 0, 0, 0, 0]
    assert guidance("linear", 5, every=2, stop_step=4) == pytest.approx([2, 0, 1, 0, 0])


def test_a_warm_up_rises_linearly_and_no_step_of_it_has_weight_0() -> None:
    assert guidance("constant", 6, warmup_steps=4) == pytest.approx([0.5, 1, 1.5, 2, 2, 2])
    assert guidance("constant", 5, warmup_steps=1) == [2, 2, 2, 2, 2]
    assert guidance("constant", 7, warmup_steps=4, every=2, stop_step=6) == pytest.approx([0.5, 0, 1.5, 0, 2, 0, 0])


def test_a_warm_up_comes_after_prealignment_and_before_the_decay() -> None:
    after = {"prealign_steps": 2, "warmup_steps": 2}
    assert guidance("constant", 5, **after) == pytest.approx([2, 2, 1, 2, 2])
    expected = [2, 2, 1, 2, 2, 1.5, 1, 0.5, 0]  # the decay is over the four steps 4 to 7
    assert guidance("linear", 9, **after, stop_step=8) == pytest.approx(expected)
    assert guidance("linear", 9, **after, total_steps=8) == pytest.approx(expected)
    assert guidance("linear", 4, **after, total_steps=4) == pytest.approx([2, 2, 1, 2])  # nothing is left to decay
    assert [make_schedule("linear", 2.0, **after, total_steps=8)(step).task for step in (1, 2)] == [0, 1]


def test_words_where_a_warm_up_is_too_long() -> None:
    words = (
        "guidance_warmup_steps is 4 after prealign_steps=2, but guidance stops at step 6, before it has its full weight"
    )
    with pytest.raises(ValueError, match=words):
        check_warmup(4, 2, 6)
    with pytest.raises(
        ValueError, match=r"guidance_warmup_steps is 6, but guidance stops at step 6.*lower guidance_warmup"
    ):
        make_schedule("constant", 1.0, warmup_steps=6, stop_step=6)
    words = (
        "guidance_warmup_steps is 4 after prealign_steps=2, but the run has 5 optimizer steps: lower guidance_warmup"
    )
    with pytest.raises(ValueError, match=words):
        make_schedule("constant", 1.0, warmup_steps=4, prealign_steps=2, total_steps=5)
    with pytest.raises(ValueError, match="guidance_warmup_steps is -1; it must be at least 0"):
        check_warmup(-1, 0, None)
    check_warmup(4, 2, 7, 6)
    check_warmup(0, 6, 6, 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_once_stopped_guidance_is_off_for_good_and_its_weight_before_is_as_without(name: str) -> None:
    whole = guidance(name, 8, stop_step=8, warmup_steps=2)
    assert guidance(name, 8, stop_step=8, warmup_steps=2, stopped_at=5) == [*whole[:5], 0, 0, 0]
    schedule = make_schedule(name, 2.0, prealign_steps=6, stop_step=8, stopped_at=4)
    assert [schedule(step) for step in (3, 4, 7)] == [(2.0, 0.0), (0.0, 1.0), (0.0, 1.0)]


def test_unknown_schedule_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Unknown guidance_schedule 'exponential'; possible are constant, linear, cos"):
        check_schedule("exponential")
    with pytest.raises(ValueError, match="Unknown guidance_schedule 'exponential'"):
        make_schedule("exponential", 1.0)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"constant"}))
def test_a_decay_without_an_end_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"guidance_schedule '{name}' needs an end: set guidance_stop_step"):
        make_schedule(name, 1.0)
