"""Time, memory and arithmetic of training steps."""

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
from hf_guidance.similarity.layers import PRIMAL_BELOW
from hf_guidance.similarity.matrices import outer
from hf_guidance.trainer.steps import Clock

LARGEST = {"cpu": 1024, "cuda": 8192}  # size of the square matrices that a rate is measured on


@dataclass
class Reading:
    """A measurement of a stretch of work, available once that work is done; None if it cannot be measured."""

    value: float | None = None


Probe = Callable[[], AbstractContextManager[Reading]]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Reading]:
    """Measure by how many bytes the allocated memory of the device rises at the peak inside the context.

    On a CPU, torch and Python (numpy included) are measured by separate tools, and their peaks are added. The sum is an
    upper bound.
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports that there is no GPU
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
    """Measure the seconds of GPU kernels and copies inside the context, without waits for the CPU; None on a CPU."""
    busy = Reading()
    if device.type != "cuda":
        yield busy
        return
    torch.cuda.synchronize()  # earlier work does not count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield busy
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy.value = sum(event.device_time for event in events) / 1e6


@contextmanager
def operations() -> Iterator[Reading]:
    """Count the floating point operations of products and convolutions inside the context, as torch does.

    It counts a whole Gram matrix, of which a CPU computes half.
    """
    from torch.utils.flop_counter import FlopCounterMode

    products = {
        torch.ops.aten.mm: _of_product,
        torch.ops.aten.bmm: _of_product,
    }  # torch's own formulas fail with out_dtype
    count = Reading()
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        yield count
    count.value = counter.get_total_flops()


def _of_product(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_of(network: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of a network."""
    return [*network.parameters(), *network.buffers()]


@dataclass(eq=False)
class StepMeter(TrainerCallback):
    """A callback that times the optimizer steps of `Trainer.train` and the forwards within them.

    A step lasts from the first forward to the cleared gradients. Loading batches and writing logs happen between steps.
    With a probe, each step is read by the probe instead of being timed.

    Args:
        clock: Clock of the device.
        discard: Number of steps at the start of each call of `train` that are not counted.
    """

    clock: Clock
    discard: int = 1
    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._marks: list[tuple[Any, Any, list[tuple[Any, Any]]]] = []
        self._probe: Probe | None = None
        self._fetching = False
        self._inside = ExitStack()  # contexts entered for the present step
        self._readings: list[Reading] = []
        self.in_step = self.counted = False  # of the present step

    @contextmanager
    def reading(self, probe: Probe, fetching: bool = False) -> Iterator[list[Reading]]:
        """Read each counted step by a probe instead of timing it.

        Args:
            probe: Makes the context that reads a step.
            fetching: Read also the time between the end of the previous step and this one.

        Returns:
            The readings, one per counted step.
        """
        self._probe, self._fetching, self._readings = probe, fetching, []
        try:
            yield self._readings
        finally:
            self._inside.close()  # still open if a step failed
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
        """Call `run` and count its time as a forward of the present step."""
        began = self.clock.now()
        found = run(*args, **kwargs)
        self._forwards.append((began, self.clock.now()))
        return found

    def collect(self, cycle: int = 1) -> None:
        """Store the measurements since the last call as averages over `cycle` steps, so that rare work counts too."""
        marks, self._marks = self._marks, []
        steps = [self.clock.between(began, ended) for began, ended, _ in marks]
        forwards = [sum(self.clock.between(*pair) for pair in pairs) for _, _, pairs in marks]
        for found, kept in ((steps, self.steps), (forwards, self.forwards)):
            kept += [sum(found[i : i + cycle]) / cycle for i in range(0, len(found) - cycle + 1, cycle)]


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Measure the floating point operations per second of this device on large square products.

    Args:
        device: The device.
        dtype: Type of the matrices.
        repeats: Number of products, of which the fastest counts.
    """
    n, clock = LARGEST.get(device.type, 1024), Clock(device)
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        began = clock.now()
        x @ x
        seconds.append(clock.between(began, clock.now()))
    return 2 * n**3 / min(seconds[1:])


def products_alone(compared: Iterable[Compared], device: torch.device, repeats: int = 9) -> float:
    """Measure the least seconds that the products of a comparison take alone.

    These are `X Xᵀ` of each layer, by the fastest routine of this package, and `G X` for the gradient of target layers.

    Args:
        compared: The layers. Those that stay features have no such products, and are left out.
        device: The device.
        repeats: Number of runs of each product.
    """
    total = 0.0
    for layer, count in Counter(compared).items():
        if layer.features <= PRIMAL_BELOW * layer.samples:
            continue
        dtype = layer.dtype if layer.on_tensor_cores else torch.promote_types(layer.dtype, torch.float32)
        x = torch.randn(layer.samples, layer.features, device=device, dtype=dtype)
        gradient = torch.randn(layer.samples, layer.samples, device=device)
        products: list[Callable[[], Tensor]] = [partial(half_precision.outer if layer.on_tensor_cores else outer, x)]
        if layer.of_target:
            products.append(partial(half_precision.times if layer.on_tensor_cores else torch.matmul, gradient, x))
        for product in products:
            total += count * _least(product, device, repeats)
    return total


def _least(product: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest run; on a GPU its mean busy time, because runs overlap."""
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
