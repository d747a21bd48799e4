"""What accelerate and Trainer would pass over in silence on this machine: said, or refused, before training."""

from __future__ import annotations

import logging
import os
from typing import Any

from accelerate.utils import str_to_bool

logger = logging.getLogger(__name__)


def check_machine(args: Any) -> None:
    """Compare what a run asks for with what the machine gives it.

    Args:
        args: `TrainingArguments`.

    Raises:
        ValueError: FSDP without a GPU, where Trainer would run plain DDP, or several processes that do not know of
            each other, each of which would train alone.

    Warns of fp16 without a GPU, where Trainer runs float32.
    """
    if args.device.type != "cpu":
        return
    if args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        raise ValueError(
            "FSDP was asked for, but this run is on the CPU, where Trainer would run plain DDP and shard nothing. Use "
            "recipes/accelerate/cpu.yaml or another launch without FSDP, or a machine with GPUs."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started, but this one trains in a world of {args.world_size}: there is no GPU, "
            "and without --use_cpu (use_cpu=True) the processes do not meet, and each would train alone. Add it."
        )
    if args.fp16:
        logger.warning("fp16 was asked for, but on the CPU Trainer runs float32. bf16 is possible here.")
