"""The files for `accelerate launch --config_file`, read by accelerate's own loader."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from launching import CONFIGS, REPOSITORY

KINDS = {
    "cpu": DistributedType.MULTI_GPU,  # whose launcher starts as many processes as asked for, on CPUs too
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}
FILES = sorted(CONFIGS.glob("*.yaml"))


def launched(path: Any) -> Namespace:
    """The arguments as `accelerate launch` has them after reading the file."""
    words = ["--config_file", str(path), "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def test_there_is_one_file_for_each_kind() -> None:
    assert [path.stem for path in FILES] == sorted(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Any) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[path.stem]
    assert config.use_cpu == (path.stem == "cpu")
    args = launched(path)
    assert args.num_processes == 2
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        path.stem in ("cpu", "ddp"),
        path.stem == "fsdp2",
        path.stem.startswith("deepspeed"),
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_in_its_head_names_the_file_and_a_recipe_that_exists(path: Any) -> None:
    command = re.search(
        r"^#   accelerate launch --config_file (\S+) .*?(recipes/\w+\.py)", path.read_text(), re.MULTILINE
    )
    assert command
    assert command[1] == f"recipes/accelerate/{path.name}"
    assert (REPOSITORY / command[2]).is_file()


def test_the_stages_and_the_version_are_those_of_the_names() -> None:
    assert launched(CONFIGS / "fsdp2.yaml").fsdp_version == 2
    for stage in (2, 3):
        args = launched(CONFIGS / f"deepspeed_zero{stage}.yaml")
        assert args.zero_stage == stage
        assert args.gradient_accumulation_steps == "auto", "Trainer fills in its own"
        assert (args.zero3_save_16bit_model is True) == (stage == 3), "else a checkpoint holds no model"
