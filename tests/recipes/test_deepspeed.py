"""ZeRO-2 and ZeRO-3 beside plain DDP: two CPU processes, DeepSpeed from a `pip install deepspeed` of one's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import CONFIGS, Recipe
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif("not __import__('importlib').util.find_spec('deepspeed')")]

RECIPE = Recipe(
    "rnn_vs_transformer",
    {
        "max_steps": 6,
        "eval_steps": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "per_device_train_batch_size": 16,
        "eval_size": 64,
        "runs": "untrained_guide",
        "use_cpu": True,
    },
)


def launched(folder: Path, config: str, **options: Any) -> dict[str, Any]:
    """The record of a run under one of the configs, without mixed precision."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--mixed_precision", "no"]
    process = RECIPE.launch(folder, *launcher, env=env, **options)
    printed, _ = process.communicate(timeout=600)  # the first time, DeepSpeed compiles
    assert process.returncode == 0, printed[-3000:]
    return json.loads((folder / "results.json").read_text())["runs"][0]


@pytest.fixture(scope="module")
def by_ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("ddp") / "out"
    return launched(folder, "cpu"), folder


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("deepspeed_zero2", {}),
        ("deepspeed_zero3", {}),
        ("deepspeed_zero3", {"similarity_batch": "global", "shard_guide": True}),
    ],
    ids=["zero2", "zero3", "zero3, guide shared too"],
)
def test_the_run_is_that_of_ddp(
    by_ddp: tuple[dict[str, Any], Path], tmp_path: Path, config: str, options: dict[str, Any]
) -> None:
    run = launched(tmp_path / "out", config, **options)
    plain = launched(tmp_path / "plain", "cpu", **options) if options else by_ddp[0]
    for points in ("training", "curve", "similarity"):
        assert len(run[points]) == len(plain[points]) > 0
        for one, other in zip(run[points], plain[points], strict=True):
            assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-4)
    place = Path("seed-0") / "untrained_guide" / "model.safetensors"
    expected = load_file((tmp_path / "plain" if options else by_ddp[1]) / place)
    for name, weight in load_file(tmp_path / "out" / place).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-4, msg=name)  # AdamW steps of 3e-3


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    launched(folder, "deepspeed_zero3", save_total_limit=2)
    place = folder / "seed-0" / "untrained_guide"
    record = json.loads((place / "result.json").read_text())
    weights = load_file(place / "model.safetensors")
    (place / "result.json").unlink()
    shutil.rmtree(place / "checkpoint-6")
    again = launched(folder, "deepspeed_zero3", save_total_limit=2)
    assert [point["loss"] for point in again["training"]] == [point["loss"] for point in record["training"]]
    for name, weight in load_file(place / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
