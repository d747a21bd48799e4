"""The size of a network that some config describes, found without its memory, in a process of its own."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode

from hf_guidance.config import Json

SECONDS = 60  # to lay a network out, imports included
PER_SECOND = 50 * 2**20  # bytes of weights that are drawn, at the slowest
SPARE = 2**30  # bytes that a network's own code may take beside its weights
CHILD = "import sys; sys.path[:] = {path!r}; from hf_guidance.guide.size import main; main({seconds!r}, {free!r})"


@dataclass
class Size:
    """What building a network takes.

    Attributes:
        parameters: how many numbers are learned.
        weights: bytes of parameters and buffers.
        largest: bytes of the largest tensor that is made on the way.
    """

    parameters: int
    weights: int
    largest: int


def size_of(config: Mapping[str, Json], seconds: float = SECONDS) -> Size:
    """Lay out the network of a config in another process, and then build it there.

    That process reaches no Hub and finds no module in the present folder. It is ended when it takes too long or more
    memory than its weights say.

    Args:
        config: its values, ``model_type`` among them.
        seconds: how long laying it out may take.

    Raises:
        ValueError: it takes longer or more, or no network can be made of the config.
    """
    path = [os.path.abspath(place) for place in sys.path if place]
    child = CHILD.format(path=path, seconds=seconds, free=psutil.virtual_memory().available)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", child],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    said = done.stdout.splitlines()
    try:
        found = json.loads(said[-1])
    except (IndexError, ValueError) as error:
        why = "takes too long" if "Timeout (" in done.stderr else f"ended with exit code {done.returncode}"
        raise ValueError(f"to lay it out and to build it {why}") from error
    if "error" in found:
        raise ValueError(found["error"])
    return Size(**found)


def main(seconds: float, free: int) -> None:
    """Read a config from the standard input, build its network if it fits, and print its size.

    Args:
        seconds: how long laying it out may take.
        free: bytes of memory.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)  # which ends this process wherever it is
    values = json.load(sys.stdin)
    try:
        _limit_memory(2 * SPARE)
        size = _lay_out(values)
        if (needed := size.weights + size.largest) <= free:  # else it is refused for that
            faulthandler.dump_traceback_later(seconds + size.weights / PER_SECOND, exit=True)
            _limit_memory(needed + size.weights + SPARE)
            _build(values, "cpu")
        print(json.dumps(asdict(size)))
    except Exception as error:  # a network's own code meets numbers here that nobody foresaw
        print(json.dumps({"error": str(error) or type(error).__name__}))


def _limit_memory(more: int) -> None:
    """Let this process take so many bytes more than it has, where the system knows such a limit."""
    has = getattr(psutil.Process().memory_info(), "data", 0)
    if has:  # Linux alone
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (has + more, hard))


def _build(values: Mapping[str, Any], device: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**{"model_type": "", **values})
    with torch.device(device):
        return AutoModel.from_config(config, trust_remote_code=False)


def _lay_out(values: Mapping[str, Any]) -> Size:
    for device in ("meta", "cpu"):  # an architecture may compute with its weights while it is built
        made = _Largest()
        try:
            with made:
                network = _build(values, device)
        except NotImplementedError:
            continue
        parameters = list(network.parameters())
        weights = sum(map(_bytes, [*parameters, *network.buffers()]))
        return Size(sum(parameter.numel() for parameter in parameters), weights, made.bytes)
    raise ValueError("it cannot be laid out")


class _Largest(TorchFunctionMode):
    """Keeps the size of the largest tensor that is made inside."""

    bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, _bytes(made))
        return made


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
