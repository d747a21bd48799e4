"""Two real processes (gloo, DDP) with local similarity: one launch of scripts/two_processes.py, judged by its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import two_processes

SCRIPT = Path(__file__).parents[1] / "scripts" / "two_processes.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank wrote."""
    return [torch.load(file) for file in two_processes(SCRIPT, tmp_path_factory.mktemp("two_processes"))]


RUNS = ["own base", "by hand", "trained", "uneven", "stopped", "unguided", "prealigned", "noise", "calibrated"]


@pytest.mark.parametrize("run", RUNS)
def test_both_ranks_end_with_the_same_weights_and_the_same_logs(ranks: list[dict[str, Any]], run: str) -> None:
    first, second = (rank[run] for rank in ranks)
    assert first["is wrapped"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["logs"] == second["logs"]


def test_one_process_prints_the_look_at_the_first_batch_and_it_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    kinds = ("with a look", "without a look")
    assert [[rank[kind]["looks printed"] for kind in kinds] for rank in ranks] == [[1, 0], [0, 0]]
    for rank in ranks:
        one, other = (rank[kind] for kind in kinds)
        assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
        assert one["logs"] == other["logs"]


def test_the_targets_own_base_guides_as_a_copy_of_it_does(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        own, copied = rank["own base"], rank["copied base"]
        torch.testing.assert_close(own["weights"], copied["weights"], rtol=1e-6, atol=1e-6)
        losses = [[log["guidance/loss"] for log in run["logs"]] for run in (own, copied)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert losses[0][0] > 1e-4


def test_skipped_images_are_counted_over_the_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["skipped images"].startswith("7 training images could not be decoded and were skipped")


def test_the_logged_losses_are_the_mean_of_the_ranks_own(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["by hand"] for rank in ranks)
    task, guidance = (first[f"own {name}"] + second[f"own {name}"] for name in ("task", "guidance"))
    assert len({round(loss, 4) for loss in guidance}) == 4, "each micro-step of each rank has its own rows"
    (log,) = first["logs"]
    assert log["guidance/loss"] == pytest.approx(sum(guidance) / 4, abs=1e-5)
    assert log["task/loss"] == pytest.approx(sum(task) / 4, abs=1e-5)
    assert log["loss"] == pytest.approx(log["task/loss"] + 0.7 * log["guidance/loss"], rel=1e-5)


def test_the_step_follows_the_mean_of_the_ranks_own_gradients(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["by hand"] for rank in ranks)
    both = zip(first["own gradient"], second["own gradient"], strict=True)
    expected = [before - 0.1 * (a + b) / 2 for before, (a, b) in zip(first["before"], both, strict=True)]
    torch.testing.assert_close(first["after"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", ["by hand", "trained", "uneven", "stopped", "prealigned", "noise"])
def test_the_guide_keeps_every_bit_outside_ddp(ranks: list[dict[str, Any]], run: str) -> None:
    assert [rank[run]["guide is as before"] for rank in ranks] == [True, True]
    assert [rank[run]["guide is wrapped"] for rank in ranks] == [False, False]


def test_a_rank_with_too_small_a_last_batch_goes_on_without_guidance(ranks: list[dict[str, Any]]) -> None:
    assert [[len(ids) for ids in rank["uneven"]["target saw"]] for rank in ranks] == [[4, 4, 4], [4, 4, 2]]
    assert [[len(ids) for ids in rank["uneven"]["guide saw"]] for rank in ranks] == [[4, 4, 4], [4, 4]]
    logs = ranks[0]["uneven"]["logs"]
    assert [log.get("guidance/skipped_batches") for log in logs] == [None, None, 1]
    assert all("guidance/loss" in log for log in logs), "the other rank's"


def test_logs_go_on_once_there_is_no_guidance_to_report(ranks: list[dict[str, Any]]) -> None:
    assert ["guidance/loss" in log for log in ranks[0]["stopped"]["logs"]] == [True, False, False]


def test_without_a_guide_losses_and_weights_are_plain_trainers(ranks: list[dict[str, Any]]) -> None:
    plain, unguided = (ranks[0][run] for run in ("plain", "unguided"))
    assert unguided["logs"] == plain["logs"]
    assert all(torch.equal(value, plain["weights"][name]) for name, value in unguided["weights"].items())


def test_prealignment_trains_on_guidance_alone_with_every_parameter_in_ddps_graph(ranks: list[dict[str, Any]]) -> None:
    logs = ranks[0]["prealigned"]["logs"]
    assert [log["loss"] for log in logs] == pytest.approx([log["guidance/loss"] for log in logs], rel=1e-5)


def test_each_rank_draws_noise_of_its_own(ranks: list[dict[str, Any]]) -> None:
    first, second = (torch.stack(rank["noise"]["guide saw"]) for rank in ranks)
    assert first.shape == second.shape
    assert not (first == second).flatten(1).all(1).any()


def test_calibration_gives_every_rank_the_same_statistics(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["calibrated"]["statistics"] for rank in ranks)
    assert torch.equal(first, second)
    assert first.abs().min() > 0
