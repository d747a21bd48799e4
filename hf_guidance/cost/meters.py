"""Time and memory of training steps, and the arithmetic they consist of."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_guidance import gpu_kernels
from hf_guidance.clock import Clock
from hf_guidance.cost.communication import Compared
from hf_guidance.cpu_kernels import outer
from hf_guidance.together import later

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
        self.in_step = self.counted = False  # whether this step is

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self.memory and state.global_step >= self.discard:
            self._profile = peak_memory(self.clock.device)
            self._peak = self._profile.__enter__()
        self._forwards: list[tuple[Any, Any]] = []
        self.in_step, self.counted = True, state.global_step >= self.discard
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


def busy_seconds(device: torch.device, work: Callable[[], Any]) -> float | None:
    """Seconds that a GPU's kernels and copies take in some work, without its waits for the CPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time for event in events) / 1e6


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


def products_alone(compared: Iterable[Compared], device: torch.device, repeats: int = 9) -> float:
    """Least seconds that the products of a comparison take and nothing else: ``X Xᵀ`` of each layer, as fast as this
    package has it, and ``G X`` for the gradient of those of the target.

    Args:
        compared: the layers; those that are made together on this device are so here.
    """
    total = 0.0
    for layer, count in Counter(compared).items():
        dtype = layer.dtype if layer.on_tensor_cores else torch.promote_types(layer.dtype, torch.float32)
        x = torch.randn(layer.samples, layer.features, device=device, dtype=dtype)
        kept = later(x.requires_grad_(layer.of_target), dtype)
        x = x.detach()
        if kept is not None and not kept.multiplied:
            x, count = x.expand(count, *x.shape).contiguous(), 1
        gradient = torch.randn(*x.shape[:-1], x.shape[-2], device=device)
        products: list[Callable[[], Tensor]] = [partial(gpu_kernels.outer if layer.on_tensor_cores else outer, x)]
        if layer.of_target:
            products.append(partial(gpu_kernels.times if layer.on_tensor_cores else torch.matmul, gradient, x))
        for product in products:
            total += count * _least(product, device, repeats)
    return total


def _least(product: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Seconds of the best of some runs; on a GPU those it is at work on average, as most end before the next begins."""
    product()
    if (busy := busy_seconds(device, lambda: [product() for _ in range(repeats)])) is not None:
        return busy / repeats
    clock, seconds = Clock(device), []
    for _ in range(repeats):
        began = clock.now()
        product()
        seconds.append(clock.between(began, clock.now()))
    return min(seconds)


def operations(work: Callable[[], Any]) -> int:
    """Floating point operations of the products and convolutions in some work, as torch counts them: all of a Gram
    matrix, of which a CPU computes half."""
    from torch.utils.flop_counter import FlopCounterMode

    products = {torch.ops.aten.mm: _of_product, torch.ops.aten.bmm: _of_product}  # torch's own fail at an out_dtype
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        work()
    return counter.get_total_flops()


def _of_product(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]
