"""The machine, the library versions and the command of a run."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState

# name in the list of processes → words that a user types
LAUNCHERS = {
    "accelerate.commands.launch": ["accelerate", "launch"],
    "accelerate-launch": ["accelerate", "launch"],
    "torchrun": ["torchrun"],
    "torch.distributed.run": ["torchrun"],
}


def usable_cpus() -> int:
    """Count the CPUs that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line() -> list[str] | None:
    """Return the words of the command that started this run, including its launcher.

    Return None in a notebook, or if the command is unknown.
    """
    if PartialState().num_processes > 1:
        return _launched()
    main, started = sys.modules["__main__"], sys.argv[:1]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        program = started if spec.name == "__main__" else ["-m", spec.name.removesuffix(".__main__")]
    elif file and started and os.path.realpath(file) == os.path.realpath(started[0]):
        program = started
    else:
        return None
    return ["python", *program, *sys.argv[1:]]


def _launched() -> list[str] | None:
    """Find the command line of the launcher among the parent processes."""
    for process in psutil.Process().parents():
        words = process.cmdline()
        for place, word in enumerate(words):
            name = os.path.basename(word)
            if name == "accelerate" and words[place + 1 : place + 2] == ["launch"]:
                return ["accelerate", "launch", *words[place + 2 :]]
            if name in LAUNCHERS:
                return [*LAUNCHERS[name], *words[place + 1 :]]
    return None


def environment() -> dict[str, Any]:
    """Return the versions and the hardware of this run."""
    import accelerate
    import transformers

    import hf_guidance

    device = PartialState().device
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor_name()
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "hf_guidance": hf_guidance}
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
