"""Time and memory of training steps, and the arithmetic they consist of."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_guidance.clock import Clock
from hf_guidance.cpu_kernels import outer

LARGEST = {"cpu": 1024, "cuda": 8192}  # matrices that a rate of products is taken from


@dataclass
class Peak:
    """How many bytes more than at its start a stretch of work held at its peak; None where it cannot be told."""

    extra: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of what is allocated inside, on the device, over what was at the start."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak.extra = torch.cuda.max_memory_allocated() - start
        return
    if device.type != "cpu":
        yield peak
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports that there is no GPU otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield peak
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak.extra = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak.extra = max(peak.extra, held)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_of(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


@dataclass(eq=False)
class StepMeter(TrainerCallback):
    """Times optimizer steps of `Trainer.train`, from the first forward to the cleared gradients, and the forwards
    within; or takes their memory. Fetching batches and writing logs happen between steps.

    Args:
        clock: of the device.
        discard: steps at the start of each call of `train` that are not counted.
        memory: take the peak of those steps instead of their time.
    """

    clock: Clock
    discard: int = 1
    memory: bool = False
    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)
    peak: Peak = field(default_factory=Peak)

    def __post_init__(self) -> None:
        self._marks: list[tuple[Any, Any, list[tuple[Any, Any]]]] = []
        self._profile: Any = None
        self.in_step = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.memory and state.global_step >= self.discard:
            self._profile = peak_memory(self.clock.device)
            self._peak = self._profile.__enter__()
        self._forwards: list[tuple[Any, Any]] = []
        self.in_step = True
        self._began = self.clock.now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        ended = self.clock.now()
        self.in_step = False
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None
            self.peak.extra = max(self._peak.extra or 0, self.peak.extra or 0) if self._peak.extra is not None else None
        elif state.global_step > self.discard:
            self._marks.append((self._began, ended, self._forwards))

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `run` returns; its time is that of a forward of the step under way."""
        began = self.clock.now()
        found = run(*args, **kwargs)
        self._forwards.append((began, self.clock.now()))
        return found

    def collect(self, cycle: int = 1) -> None:
        """Take over what was measured since, as averages over `cycle` steps: what happens every so often counts."""
        marks, self._marks = self._marks, []
        steps = [self.clock.between(began, ended) for began, ended, _ in marks]
        forwards = [sum(self.clock.between(*pair) for pair in pairs) for _, _, pairs in marks]
        for found, kept in ((steps, self.steps), (forwards, self.forwards)):
            kept += [sum(found[i : i + cycle]) / cycle for i in range(0, len(found) - cycle + 1, cycle)]


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating point operations a second of this device in the best of some large square products."""
    n, clock = LARGEST.get(device.type, 1024), Clock(device)
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        began = clock.now()
        x @ x
        seconds.append(clock.between(began, clock.now()))
    return 2 * n**3 / min(seconds[1:])


def products_alone(compared: Iterable[tuple[int, int, bool]], device: torch.device, repeats: int = 9) -> float:
    """Least seconds that the products of a comparison take and nothing else: ``X Xᵀ`` of each layer, as fast as this
    package has it, and ``G X`` for the gradient of those of the target.

    Args:
        compared: of each layer its samples, its features, and whether it is the target's.
    """
    clock, total = Clock(device), 0.0
    for (n, width, of_target), count in Counter(compared).items():
        x, gradient = torch.randn(n, width, device=device), torch.randn(n, n, device=device)
        for product in [lambda: outer(x), *([lambda: gradient @ x] if of_target else [])]:  # noqa: B023  called here
            seconds = []
            for _ in range(repeats):
                began = clock.now()
                product()
                seconds.append(clock.between(began, clock.now()))
            total += count * min(seconds)
    return total


def operations(work: Callable[[], Any]) -> int:
    """Floating point operations of the products and convolutions in some work, as torch counts them: all of a Gram
    matrix, of which a CPU computes half."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
