"""Size of the network that a config describes, measured in a process of its own without the network's memory."""

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

SECONDS = 60  # limit for laying a network out, imports included
PER_SECOND = 50 * 2**20  # bytes of weights that the slowest machine draws
SPARE = 2**30  # bytes that a network's code may take in addition to its weights
CHILD = "import sys; sys.path[:] = {path!r}; from hf_guidance.guide.size import main; main({seconds!r}, {free!r})"


@dataclass
class Size:
    """Memory that a network takes.

    Attributes:
        parameters: Number of learned values.
        weights: Bytes of parameters and buffers.
        largest: Bytes of the largest tensor made while building it.
    """

    parameters: int
    weights: int
    largest: int


def size_of(config: Mapping[str, Json], seconds: float = SECONDS) -> Size:
    """Measure a network in another process: lay it out on the meta device if possible, then build it.

    That process has no access to the Hub, and imports nothing from the current folder. It is ended if it takes too
    long, or more memory than its weights explain.

    Args:
        config: Values of the config, with `model_type`.
        seconds: Time limit for laying the network out.

    Returns:
        The size.

    Raises:
        ValueError: If it takes too long or too much memory, or the config describes no network.
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
        raise ValueError(f"laying it out and building it {why}") from error
    if "error" in found:
        raise ValueError(found["error"])
    return Size(**found)


def main(seconds: float, free: int) -> None:
    """Read a config from standard input, build its network if it fits, and print its size.

    Args:
        seconds: Time limit for laying the network out.
        free: Free memory in bytes.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)  # ends this process whatever it is doing
    values = json.load(sys.stdin)
    try:
        _limit_memory(2 * SPARE)
        size = _lay_out(values)
        if (needed := size.weights + size.largest) <= free:  # otherwise the caller refuses it
            faulthandler.dump_traceback_later(seconds + size.weights / PER_SECOND, exit=True)
            _limit_memory(needed + size.weights + SPARE)
            _build(values, "cpu")
        print(json.dumps(asdict(size)))
    except Exception as error:  # a network's own code may raise anything on such numbers
        print(json.dumps({"error": str(error) or type(error).__name__}))


def _limit_memory(more: int) -> None:
    """Limit this process to `more` bytes beyond what it has, if the system supports such a limit."""
    has = getattr(psutil.Process().memory_info(), "data", 0)
    if has:  # Linux only
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (has + more, hard))


def _build(values: Mapping[str, Any], device: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**{"model_type": "", **values})
    with torch.device(device):
        return AutoModel.from_config(config, trust_remote_code=False)


def _lay_out(values: Mapping[str, Any]) -> Size:
    for device in ("meta", "cpu"):  # some architectures compute with their weights while building
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
    """Tracker of the largest tensor made inside this context."""

    bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, _bytes(made))
        return made


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
