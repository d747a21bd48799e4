"""The machine and the versions that a figure was made with."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState


def usable_cpus() -> int:
    """Processors this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line() -> list[str] | None:
    """The words that started this process, if they were those of a script or a module; None in a notebook."""
    main, started = sys.modules["__main__"], sys.argv[:1]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        program = ["-m", spec.name.removesuffix(".__main__")]
    elif file and started and os.path.realpath(file) == os.path.realpath(started[0]):
        program = started
    else:
        return None
    processes = PartialState().num_processes
    launcher = ["accelerate", "launch", "--num_processes", str(processes)] if processes > 1 else ["python"]
    return [*launcher, *program, *sys.argv[1:]]


def environment() -> dict[str, Any]:
    """Versions and hardware a figure was made with."""
    import accelerate
    import transformers

    device = PartialState().device
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor_name()
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate}
    return {
        "python": platform.python_version(),
        **{name: module.__version__ for name, module in modules.items()},
        "device": f"{device.type}: {name}",
        "processes": PartialState().num_processes,
        "threads": torch.get_num_threads(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
