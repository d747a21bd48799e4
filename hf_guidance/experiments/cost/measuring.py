"""Cost of guidance: time and memory of the real trainers' steps, measured in turns.

The *floor* is a plain step plus the forward of the whole guide without gradients. The guide runs in the precision,
layout and compile mode, and as often, as in the guided step. With a cached guide the floor is the plain step alone.
The *overhead* is guided step / floor. The extra time of the guided step is split by its forwards:

    guided − plain = guide forward + Grams and measures + extra backward
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.cost.communication import Compared, bytes_of_global_batch, compared_features
from hf_guidance.experiments.cost.meters import (
    StepMeter,
    busy_seconds,
    matmul_rate,
    operations,
    peak_memory,
    products_alone,
)
from hf_guidance.experiments.cost.random_rows import RandomRows
from hf_guidance.experiments.cost.ratios import middle_and_least, overhead_of_rounds, summary
from hf_guidance.experiments.cost.variants import GuideForwards, Steps, make_trainers
from hf_guidance.loss import GuidanceLoss
from hf_guidance.similarity.half_precision import for_tensor_cores

logger = logging.getLogger(__name__)

BUSY_STEPS = 2  # steps over which the work of a GPU is summed
SKETCH = 1024  # dimensions of the sketch whose bytes are compared with the exact ones


@dataclass(frozen=True)
class Plan:
    """The number of measurements.

    Args:
        rounds: Turns per variant.
        steps: Counted steps per turn.
        discard: Uncounted steps before them, in which caches and allocator adapt to the variant.
        paper: Measure the paper's formulation too.
        arithmetic: Count floating point operations and measure the rate of the device too.
    """

    rounds: int = 5
    steps: int = 3
    discard: int = 1
    paper: bool = True
    arithmetic: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("steps", 1), ("discard", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def measure_cost(
    target: PreTrainedModel,
    guide: nn.Module,
    rows: RandomRows,
    args: TrainingArguments,
    guidance: GuidanceConfig,
    plan: Plan,
) -> dict[str, Any]:
    """Measure a plain step, the guide's forward, the guided step and the paper's formulation in turns.

    Args:
        target: The target, copied for each variant so that all start equally.
        guide: The guide, shared by all variants.
        rows: Rows of some batches, which are repeated. The column of sample ids that `guidance` names is added for the
            guided trainer only.
        args: Training arguments of all variants.
        guidance: Settings of the guidance.
        plan: Number of measurements.

    Returns:
        For each variant, seconds per step (median, minimum, all), samples per second and peak bytes. Split, floor,
        overhead and other ratios, from medians and from minima: see `summary`. The overhead of each round: see
        `overhead_of_rounds`. On a GPU, its busy seconds per step. The bytes that a process would send to each other
        one for a global batch, exact and sketched (None if no layer is that wide).

    Raises:
        ValueError: If some counted steps are guided and others are not, other than by `guidance_every`, or if the rows
            are no multiple of the rows of a step.
    """
    cycle = guidance.guidance_every
    guidance = replace(guidance, guidance_warmup_steps=0)  # the cost of a step does not depend on the weight
    counted = math.ceil(plan.steps / cycle) * cycle
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if len(rows) % a_step:
        raise ValueError(f"there are {len(rows)} rows, and a step takes {a_step}: give a multiple of {a_step}.")
    trainers = make_trainers(target, guide, rows, args, guidance, paper=plan.paper)
    variants: dict[str, Any] = {name: Steps(trainer, plan.discard, cycle) for name, trainer in trainers.items()}
    guided: Any = trainers["guided"]
    share = _guided_share(guided.guidance_loss, range(plan.discard, plan.discard + counted))
    alone = GuideForwards(guided, plan.discard)
    variants = {"plain": variants.pop("plain"), "guide": alone, **variants}
    steps: StepMeter = variants["guided"].meter
    runs: list[bool] = []  # one entry per run of the guide in a guided step: whether the step is counted
    handle = guide.register_forward_pre_hook(lambda *_: runs.append(steps.counted) if steps.in_step else None)
    enough = max(len(alone.batches), counted, BUSY_STEPS * cycle)  # fills a cache of the guide, on the same batches
    for variant in variants.values():  # warms up allocators, CPU caches and optimizer states
        variant.advance(plan.discard + enough)
        variant.meter.steps, variant.meter.forwards = [], []
    runs.clear()
    for _ in range(plan.rounds):
        for variant in variants.values():
            variant.advance(plan.discard + counted)
    found: Any = {name: _seconds(v.meter, args) for name, v in variants.items()}
    found["guide_forwards"] = sum(runs) / (plan.rounds * counted)
    found["batches_of_a_step"] = args.gradient_accumulation_steps
    found |= summary(found) | {"overhead_of_rounds": overhead_of_rounds(found, plan.rounds)}
    found["memory"] = _memory(variants, alone, cycle)
    found["pairs"] = len(guided.guidance_loss.pairs or [])
    size = guidance.sketch or SKETCH
    networks = guided.model, guided.guide, guidance, guided.accelerator.autocast, alone.batches[0]
    comparisons = share * args.gradient_accumulation_steps  # per step
    sent = {"exact": bytes_of_global_batch(*networks, None), "sketched": bytes_of_global_batch(*networks, size)}
    of_step = {kind: None if count is None else round(comparisons * count) for kind, count in sent.items()}
    found["global_bytes"] = {"sketch": size, **of_step}
    if busy := _busy(variants, args.device, cycle, runs):
        found["busy"] = busy
    if plan.arithmetic:
        try:
            arithmetic = _arithmetic(variants, args, cycle, runs)
            found["arithmetic"] = arithmetic
            compared = _compared_in_step(compared_features(*networks), args, guidance)
            products = products_alone(compared, args.device)
            arithmetic["products_seconds"] = share * products if products else None
        except Exception:
            found.pop("arithmetic", None)
            logger.exception("The arithmetic could not be counted; what was measured is kept.")
    handle.remove()
    return found


def _guided_share(loss: GuidanceLoss, steps: range) -> float:
    """Return the share of the counted steps that are guided, which must be the same in every cycle.

    Raises:
        ValueError: If the cycles have different numbers of guided steps, or may have.
    """
    loss.total_steps, config = steps.stop, loss.config
    if config.guidance_stop_similarity is not None:
        raise ValueError(
            "guidance_stop_similarity may end guidance while steps are counted, and their times would be of two kinds: "
            "leave it out to measure the cost."
        )
    guided = [bool(loss.weights(step).guidance) for step in steps]
    cycles = {sum(guided[i : i + config.guidance_every]) for i in range(0, len(steps), config.guidance_every)}
    if len(cycles) > 1:
        raise ValueError(
            f"steps {steps.start} to {steps.stop - 1} of each turn are counted, and they are not guided alike "
            f"(guidance_stop_step={config.guidance_stop_step}, prealign_steps={config.prealign_steps}, guidance_every="
            f"{config.guidance_every}): their times would be of two kinds. Leave out guidance_stop_step and "
            "prealign_steps, or choose other values of discard and steps."
        )
    return sum(guided) / len(steps)


def _compared_in_step(layers: list[Compared], args: TrainingArguments, guidance: GuidanceConfig) -> list[Compared]:
    """Return the layers of each comparison in a guided step, from those of one micro-batch."""
    times = args.gradient_accumulation_steps
    if guidance.similarity_batch != "accumulated":
        return layers * times
    joined = [layer._replace(samples=times * layer.samples) for layer in layers]
    # layers of the guide appear once
    return [layer for layer in joined for _ in range(times if layer.of_target else 1)]


def _seconds(meter: StepMeter, args: TrainingArguments) -> dict[str, Any]:
    batch = args.per_device_train_batch_size * (args.gradient_accumulation_steps if meter.forwards else 1)
    found: dict[str, Any] = middle_and_least(meter.steps) | {"all": meter.steps}
    found["samples_per_second"] = batch / found["median"]
    if meter.forwards:
        found["forward"] = middle_and_least(meter.forwards)
    return found


def _memory(variants: dict[str, Any], alone: GuideForwards, steps: int) -> dict[str, Any]:
    """Return the peak bytes of each variant, and the bounds of the guided step; see the keys."""
    peaks: dict[str, Any] = {}
    for name, variant in variants.items():
        extra = variant.read(partial(peak_memory, alone.meter.clock.device), steps)
        peaks[name] = None if None in extra else variant.resident() + max(extra)
    guide, layer = alone.resident(), alone.largest_layer()
    bound = None if peaks["plain"] is None else round(1.05 * (peaks["plain"] + guide + layer))
    return {"peak": peaks, "guide_weights": guide, "largest_guide_layer": layer, "plain_guide_layer_5_percent": bound}


def _busy(variants: dict[str, Any], device: torch.device, cycle: int, runs: list[bool]) -> dict[str, Any] | None:
    """Measure how long a GPU works per step, loading its batch included, for each variant, and the overhead from that.

    Args:
        variants: Name → variant.
        device: The device; any other than a GPU gives None.
        cycle: Steps in a cycle of `guidance_every`.
        runs: A list that each run of the guide in a guided step extends by whether the step is counted.
    """
    if device.type != "cuda":
        return None
    runs.clear()
    steps = math.ceil(BUSY_STEPS / cycle) * cycle
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        found[name] = sum(variant.read(partial(busy_seconds, device), steps, fetching=True)) / steps
    return found | {"overhead": found["guided"] / (found["plain"] + sum(runs) / steps * found["guide"])}


def _arithmetic(variants: dict[str, Any], args: TrainingArguments, cycle: int, runs: list[bool]) -> dict[str, Any]:
    """Compute the time of products and convolutions at the rate of large products on this device.

    Args:
        runs: As in `_busy`.
    """
    runs.clear()
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    of_grams = dtype if for_tensor_cores(torch.empty(0, dtype=dtype, device=args.device)) else torch.float32
    rates = {"step": matmul_rate(args.device, dtype), "grams": matmul_rate(args.device, of_grams)}
    kinds = ("plain", "guide", "guided")
    count = {name: round(sum(variants[name].read(operations, cycle)) / cycle) for name in kinds}
    of_guide = round(sum(runs) / cycle * count["guide"])
    grams = max(0, count["guided"] - count["plain"] - of_guide)
    floor = (count["plain"] + of_guide) / rates["step"]
    seconds = {"floor_seconds": floor, "grams_seconds": grams / rates["grams"]}
    return {"operations": {**count, "grams": grams}, "operations_per_second": rates, "dtype": str(dtype), **seconds}
