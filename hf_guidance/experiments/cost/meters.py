"""Time and memory of training steps, and the arithmetic they consist of."""

from __future__ import annotations

import math
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_guidance.experiments.cost.communication import Compared
from hf_guidance.similarity import half_precision
from hf_guidance.similarity.numpy_products import outer
from hf_guidance.similarity.representation import later
from hf_guidance.trainer.clock import Clock

LARGEST = {"cpu": 1024, "cuda": 8192}  # matrices that a rate of products is taken from


@dataclass
class Reading:
    """What was measured of a stretch of work, once that is over; None where it cannot be told."""

    value: float | None = None


Probe = Callable[[], AbstractContextManager[Reading]]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Reading]:
    """How many bytes more than at the start are allocated inside at the peak, on the device.

    On a CPU torch and numpy (with all else of Python) are watched by tools of their own, and their peaks added up: it
    is at most that.
    """
    peak = Reading()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        peak.value = torch.cuda.max_memory_allocated() - start
        return
    if device.type != "cpu":
        yield peak
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports that there is no GPU otherwise
    tracemalloc.start()
    try:
        start, _ = tracemalloc.get_traced_memory()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            yield peak
        of_numpy = tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    peak.value = most + of_numpy


@contextmanager
def busy_seconds(device: torch.device) -> Iterator[Reading]:
    """Seconds that a GPU's kernels and copies take inside, without its waits for the CPU; None on a CPU."""
    busy = Reading()
    if device.type != "cuda":
        yield busy
        return
    torch.cuda.synchronize()  # what was begun before is no part of it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield busy
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy.value = sum(event.device_time for event in events) / 1e6


@contextmanager
def operations() -> Iterator[Reading]:
    """Floating point operations of the products and convolutions inside, as torch counts them: all of a Gram matrix,
    of which a CPU computes half."""
    from torch.utils.flop_counter import FlopCounterMode

    products = {torch.ops.aten.mm: _of_product, torch.ops.aten.bmm: _of_product}  # torch's own fail at an out_dtype
    count = Reading()
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        yield count
    count.value = counter.get_total_flops()


def _of_product(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_of(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


@dataclass(eq=False)
class StepMeter(TrainerCallback):
    """Times optimizer steps of `Trainer.train`, from the first forward to the cleared gradients, and the forwards
    within; or takes a reading of each. Fetching batches and writing logs happen between steps.

    Args:
        clock: of the device.
        discard: steps at the start of each call of `train` that are not counted.
    """

    clock: Clock
    discard: int = 1
    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._marks: list[tuple[Any, Any, list[tuple[Any, Any]]]] = []
        self._probe: Probe | None = None
        self._fetching = False
        self._inside = ExitStack()  # what was entered at the start of the step under way
        self._readings: list[Reading] = []
        self.in_step = self.counted = False  # whether this step is

    @contextmanager
    def reading(self, probe: Probe, fetching: bool = False) -> Iterator[list[Reading]]:
        """Inside, counted steps are not timed, but each is read by the probe; with all that comes between the step
        before and its own end, if that is asked for."""
        self._probe, self._fetching, self._readings = probe, fetching, []
        try:
            yield self._readings
        finally:
            self._inside.close()  # open where a step failed
            self._probe = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.in_step, self.counted = True, state.global_step >= self.discard
        self._forwards: list[tuple[Any, Any]] = []
        if self.counted and not self._fetching:
            self._enter()
        self._began = self.clock.now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        ended = self.clock.now()
        self.in_step = False
        self._inside.close()
        if self.counted and not self._probe:
            self._marks.append((self._began, ended, self._forwards))
        if self._fetching and self.discard <= state.global_step < state.max_steps:
            self._enter()

    def _enter(self) -> None:
        if self._probe:
            self._readings.append(self._inside.enter_context(self._probe()))

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
        products: list[Callable[[], Tensor]] = [partial(half_precision.outer if layer.on_tensor_cores else outer, x)]
        if layer.of_target:
            products.append(partial(half_precision.times if layer.on_tensor_cores else torch.matmul, gradient, x))
        for product in products:
            total += count * _least(product, device, repeats)
    return total


def _least(product: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Seconds of the best of some runs; on a GPU those it is at work on average, as most end before the next begins."""
    product()
    if device.type == "cuda":
        with busy_seconds(device) as busy:
            for _ in range(repeats):
                product()
        return (busy.value or 0.0) / repeats
    clock, seconds = Clock(device), []
    for _ in range(repeats):
        began = clock.now()
        product()
        seconds.append(clock.between(began, clock.now()))
    return min(seconds)
