"""The size of a network that some config describes, found without its memory, in a process of its own."""

from __future__ import annotations

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

SECONDS = 60  # for the whole process, imports included
CHILD = "from hf_guidance.guide.size import main; main()"


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


def size_of(config: Mapping[str, Any], seconds: float = SECONDS) -> Size:
    """Lay out the network of a config in another process, which reaches no Hub and is ended when it takes too long.

    Args:
        config: its values, ``model_type`` among them.
        seconds: how long it may take.

    Raises:
        ValueError: it takes longer, or no network can be made of the config.
    """
    path = os.pathsep.join([place for place in sys.path if place])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command, text = [sys.executable, "-c", CHILD], json.dumps(config)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"to lay it out takes more than {seconds:g} s") from error
    said = done.stdout.splitlines()
    try:
        found = json.loads(said[-1])
    except (IndexError, ValueError) as error:
        raise ValueError(f"laying it out ended with exit code {done.returncode}") from error
    if "error" in found:
        raise ValueError(found["error"])
    return Size(**found)


def main() -> None:
    """Read a config from the standard input, and print the size of its network."""
    _limit_memory()
    try:
        print(json.dumps(asdict(_lay_out(json.load(sys.stdin)))))
    except Exception as error:  # a network's own code meets numbers here that nobody foresaw
        print(json.dumps({"error": str(error) or type(error).__name__}))


def _limit_memory() -> None:
    """Let this process have no more than what is free, so that it cannot push others out."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.virtual_memory().available, hard))


def _lay_out(values: dict[str, Any]) -> Size:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(values.pop("model_type", ""), **values)
    for device in ("meta", "cpu"):  # an architecture may compute with its weights while it is built
        made = _Largest()
        try:
            with torch.device(device), made:
                network = AutoModel.from_config(config, trust_remote_code=False)
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
