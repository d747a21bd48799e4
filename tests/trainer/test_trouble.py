"""Two processes (gloo), of which one is in trouble: scripts/two_in_trouble.py and scripts/dying_rank.py, judged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import CONFIGS

SCRIPTS = Path(__file__).parents[1] / "scripts"
PATHS = os.pathsep.join([str(SCRIPTS.parent), str(SCRIPTS.parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


def run(*command: str, timeout: int = 400) -> tuple[int, str]:
    """Return the exit status, and what was printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *command], env=ENVIRONMENT, timeout=timeout, check=False, **pipes)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank wrote."""
    folder = tmp_path_factory.mktemp("trouble")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    status, printed = run(*launch, str(SCRIPTS / "two_in_trouble.py"), str(folder), "--use_cpu")
    assert status == 0, printed[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_a_similarity_that_is_not_finite_on_one_rank_stops_all_with_the_same_words(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["stop"]["error"] for rank in ranks)
    assert first == second
    pair = r"the linear_cka of hidden_states\.2~hidden_states\.3 is nan \(rank 1\)"
    assert re.match(rf"Optimizer step 2 is not finite: {pair}\. It was not taken", first)
    assert [rank["stop"]["steps"] for rank in ranks] == [1, 1]


def test_a_skipped_step_is_skipped_by_all_and_counted_once(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["skip"] for rank in ranks)
    assert [log.get("guidance/skipped_steps") for log in first["logs"]] == [None, 1, None]
    assert [rank["skip"]["steps"] for rank in ranks] == [3, 3]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert all(value.isfinite().all() for value in first["weights"].values())


def test_what_vouches_for_a_checkpoint_is_written_after_every_rank_is_done(
    ranks: list[dict[str, Any]],
) -> None:
    assert [rank["late"]["was there"] for rank in ranks] == [[True], []]


def test_a_target_under_fully_shard_has_the_loss_and_gradients_of_a_whole_one(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["sharded"]["whole"]["loss"] for rank in ranks)
    assert abs(first - second) > 1e-4, "each rank has its own batch"
    for rank in ranks:
        whole, half = rank["sharded"]["whole"], rank["sharded"]["sharded"]
        assert all(half["is sharded"])
        assert not any(whole["is sharded"])
        assert not rank["sharded"]["guide is sharded"]
        assert half["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        torch.testing.assert_close(half["gradients"], whole["gradients"], rtol=1e-4, atol=2e-6)


def test_a_guide_that_is_shared_between_the_ranks_guides_as_a_whole_one(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        whole, shared = rank["sharded guide"]["whole"], rank["sharded guide"]["shared"]
        assert len(shared["losses"]) == 3
        assert "guidance/loss" in shared["losses"][0]
        for one, other in zip(whole["losses"], shared["losses"], strict=True):
            assert other == pytest.approx(one, rel=1e-6)
        torch.testing.assert_close(shared["weights"], whole["weights"], rtol=1e-6, atol=1e-7)
        assert shared["identity"] == shared["fingerprint"] == whole["fingerprint"]
        assert shared["saved"].keys() == whole["saved"].keys()
        assert all(torch.equal(tensor, whole["saved"][name]) for name, tensor in shared["saved"].items())
    held = [rank["sharded guide"]["shared"]["held"] for rank in ranks]
    assert sum(held) == ranks[0]["sharded guide"]["whole"]["held"]
    assert max(held) <= 0.6 * sum(held)


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("raise", "RuntimeError: the second rank has had enough"),
        ("kill", r"Signal 9 \(SIGKILL\) received by PID"),
    ],
)
def test_a_rank_that_dies_takes_the_job_down_within_a_minute_with_its_error_shown(
    tmp_path: Path, way: str, words: str
) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    status, printed = run(*launch, str(SCRIPTS / "dying_rank.py"), str(tmp_path), way)
    ended = time.time()
    assert status != 0
    assert re.search(words, printed), printed[-3000:]
    assert ended - float((tmp_path / "died").read_text()) < 60


@pytest.mark.slow
def test_ten_launches_of_each_recipe_end_with_exit_code_0(tmp_path: Path) -> None:
    status, printed = run(str(SCRIPTS / "exit_codes.py"), str(tmp_path), "--times", "10", timeout=3600)
    assert status == 0, printed[-3000:]


def test_runs_that_are_stopped_at_random_moments_end_with_the_bits_of_unbroken_ones(tmp_path: Path) -> None:
    _, printed = run(str(SCRIPTS / "stops.py"), str(tmp_path), "--kills", "3", timeout=600)
    assert "3 of 3 resumed and bit-identical" in printed, printed[-3000:]


def test_a_rank_whose_batch_is_as_long_as_its_rows_tells_a_sequence_first_guide(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["sequence-first"]["whole"] for rank in ranks)
    assert "5" in first["error"], "the other rank's rows differ from its positions, which says so by itself"
    assert re.match(r"guide layer 'layer\.\d' \(XLNetLayer\) is sequence-first: of one row", second["error"])
    for rank in ranks:
        sharded = rank["sequence-first"]["sharded"]
        assert not sharded["error"]
        assert (
            "The guide is sharded, so that it cannot be told whether the batch is on the first axis"
            in sharded["warned"]
        )
        assert [rank["sequence-first"][kind]["alone"] for kind in ("whole", "sharded")] == [True, False]
        assert not rank["FSDP 1 runs alone"]
