"""Measuring a setting of guidance over several batches, without changing the networks."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.analysis.first_batch import LayerLook, look_at_layer
from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.measurements import Measurements, PairMeasurement, StepCost, spread_of
from hf_guidance.features.batch import Batch, take_rows
from hf_guidance.guide.forward import guide_batch, without_guide
from hf_guidance.guide.freezing import BATCH_NORM, calibrate_batch_norm
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.mapping import parse_pair
from hf_guidance.schedule import Weights
from hf_guidance.similarity.pair_loss import guidance_loss_of_groups
from hf_guidance.similarity.registry import MEASURES, PENALTIES, Measure, get_measure
from hf_guidance.trainer.first_look import unchanged
from hf_guidance.trainer.forwards import watch_each, watches_each
from hf_guidance.trainer.gradient_angle import Gradients, gradients_of
from hf_guidance.trainer.guidance_mixin import GuidanceMixin
from hf_guidance.trainer.steps import Clock

BOTH = Weights(1.0, 1.0)
TOKEN_PENALTY = 0.1  # of ridge_loo, as `auto` takes it


@torch.enable_grad()
def measure_guidance(trainer: GuidanceMixin, config: GuidanceConfig, batches: Sequence[Batch]) -> Measurements:
    """Measure a setting of guidance on batches, as training would see them before its first step.

    Weights, gradients, buffers, modes and random states of both networks stay as they are.

    Args:
        trainer: The trainer, whose target and guide are measured.
        config: The setting.
        batches: Inputs on the trainer's device.

    Raises:
        ValueError: If a batch cannot be guided with this setting.
    """
    target, guide = trainer.guidance_loss.target, trainer.guide
    with unchanged(target, guide), _norms_as_they_are(guide):
        options: dict[str, Any] = {"seed": trainer.args.seed, "autocast": trainer.accelerator.autocast}
        alone = replace(config, guidance_weight=1.0, log_measures=[]).alone()  # logging is no part of a step's cost
        loss = GuidanceLoss(target, guide, alone, **options)
        try:
            if config.guide_batch_norm == "calibrated":
                calibrate_batch_norm(
                    guide, (partial(loss.forward_guide, guide_batch(b, target, guide)) for b in batches)
                )
            target.train()
            loss.keeps_layers = True
            clock = Clock(trainer.args.device)
            _backward(_task_loss(trainer, batches[0]), target)  # the first pass is the slowest
            if trainer.args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found = [_measure(trainer, loss, batch, number, clock) for number, batch in enumerate(batches)]
        finally:
            loss.close()
    return _summary(config, found, trainer.args.device)


@contextmanager
def _norms_as_they_are(guide: nn.Module) -> Iterator[None]:
    """Restore how the batch norms of a guide use their statistics."""
    kept = [(module, module.track_running_stats) for module in guide.modules() if isinstance(module, BATCH_NORM)]
    try:
        yield
    finally:
        for module, tracks in kept:
            module.track_running_stats = tracks


@dataclass(frozen=True)
class _OfBatch:
    """One batch: measure → pair → similarity, layers, gradients, and seconds of target, guide and guided step."""

    similarities: dict[str, dict[str, float]]
    targets: dict[str, LayerLook]
    guides: dict[str, LayerLook]
    gradients: Gradients | str
    seconds: tuple[float, float, float]


def _measure(trainer: GuidanceMixin, loss: GuidanceLoss, batch: Batch, number: int, clock: Clock) -> _OfBatch:
    began = clock.now()
    with torch.no_grad(), trainer.accelerator.autocast():
        loss.forward_guide(_for_guide(batch, loss))
    after_guide = clock.now()
    _backward(_task_loss(trainer, batch), loss.target)
    after_plain = clock.now()
    watch = partial(watch_each, loss) if watches_each(trainer) else loss.watch
    with watch(batch, step=number, weights=BOTH) as watched:
        task_loss = _task_loss(trainer, watched.inputs)
    after_forward = clock.now()
    if watched.loss is None or watched.layers is None:
        raise ValueError(f"batch {number} cannot be guided: {watched.why_unguided}.")
    similarities, targets, guides = _layers(loss, watched)
    _check_finite(task_loss, similarities, number)
    model: Any = trainer.model
    gradients = gradients_of(trainer, model, task_loss, watched, 1.0)
    before_backward = clock.now()
    _backward(task_loss + watched.loss.to(task_loss.device), loss.target)
    ended = clock.now()
    seconds = (
        clock.between(after_guide, after_plain),
        clock.between(began, after_guide),
        clock.between(after_plain, after_forward) + clock.between(before_backward, ended),
    )
    return _OfBatch(similarities, targets, guides, gradients, seconds)


def _check_finite(task_loss: Tensor, similarities: Mapping[str, Mapping[str, float]], number: int) -> None:
    values = {f"{measure} of {pair}": found for measure, of in similarities.items() for pair, found in of.items()}
    for name, value in {"the task loss": float(task_loss.detach()), **values}.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value} on batch {number}: look for values that are not finite in the weights of both "
                "networks and in the data."
            )


def _for_guide(batch: Batch, loss: GuidanceLoss) -> Batch:
    """Return the guide's inputs, of as many rows as guidance takes."""
    inputs = guide_batch(batch, loss.target, loss.guide)
    rows = loss.config.guide_rows
    return inputs if rows is None else take_rows(inputs, torch.arange(rows))


def _task_loss(trainer: GuidanceMixin, inputs: Batch) -> Tensor:
    """Compute the task loss alone, as the Trainer behind the mixin does."""
    own, model = without_guide(inputs, trainer.guidance.sample_id_column), trainer.model
    assert model is not None
    with trainer.accelerator.autocast():
        found = super(GuidanceMixin, trainer).compute_loss(model, own)
    assert isinstance(found, Tensor)
    return found


def _backward(loss: Tensor, target: nn.Module) -> None:
    """Run the backward of a loss, and keep no gradient."""
    weights = [weight for weight in target.parameters() if weight.requires_grad]
    torch.autograd.grad(loss, weights, allow_unused=True)


@torch.no_grad()
def _layers(
    loss: GuidanceLoss, watched: Watched
) -> tuple[dict[str, dict[str, float]], dict[str, LayerLook], dict[str, LayerLook]]:
    """Compare the layers by every measure that applies, and look at each of them."""
    assert watched.layers is not None
    targets, guides = watched.layers
    pairs = [parse_pair(name) for name in watched.similarities[loss.config.measure]]
    samples = min(max(layer.samples for layer in targets[name]) for name, _ in pairs)
    similarities = {
        measure.name: {
            pair: float(value) for pair, value in guidance_loss_of_groups(pairs, measure, targets, guides)[1].items()
        }
        for measure in measures_for(loss.config, samples)
    }
    looks = [
        {name: look_at_layer(side[name]) for name in dict.fromkeys(pair[number] for pair in pairs)}
        for number, side in enumerate((targets, guides))
    ]
    return similarities, looks[0], looks[1]


def measures_for(config: GuidanceConfig, samples: int) -> list[Measure]:
    """Return the measures that apply to layers made for a setting, that of the setting first.

    Args:
        config: The setting. A measure of the user's own, which needs features, is joined by debiased CKA alone.
        samples: Number of samples of a batch.
    """
    own = config.resolved_measure()
    others = MEASURES if own in MEASURES else ("debiased_cka",)
    found = [get_measure(name, penalty_of(config, name)) for name in dict.fromkeys([own, *others])]
    return [m for m in found if m.min_samples <= samples and (config.sketch is None or m.takes_sketch)]


def penalty_of(config: GuidanceConfig, measure: str) -> float | None:
    """Return the ridge penalty that a measure has with a setting; None for its own."""
    if measure == config.resolved_measure() and config.ridge_penalty is not None:
        return config.ridge_penalty
    return TOKEN_PENALTY if measure == "ridge_loo" and config.sample_axis == "token" else PENALTIES.get(measure)


def _summary(config: GuidanceConfig, found: Sequence[_OfBatch], device: torch.device) -> Measurements:
    first = found[0].similarities
    pairs = [
        PairMeasurement(
            *parse_pair(pair),
            {m: spread_of(b.similarities[m][pair] for b in found if pair in b.similarities.get(m, {})) for m in first},
        )
        for pair in next(iter(first.values()))
    ]
    gradients = [batch.gradients for batch in found if isinstance(batch.gradients, Gradients)]
    whys = [batch.gradients for batch in found if isinstance(batch.gradients, str)]
    target, guide, guided = (statistics.median(column) for column in zip(*(b.seconds for b in found), strict=True))
    return Measurements(
        config,
        pairs,
        _of_layers([batch.targets for batch in found]),
        _of_layers([batch.guides for batch in found]),
        spread_of(g.ratio for g in gradients) if gradients else None,
        spread_of(g.cosine for g in gradients) if gradients else None,
        "" if gradients else whys[0],
        StepCost(target, guide, max(0.0, guided - target - guide), _peak_memory(device), str(device)),
        len(found),
    )


def _of_layers(found: Sequence[dict[str, LayerLook]]) -> dict[str, LayerLook]:
    """Join the looks at each layer: dead where it is dead in every batch, and the means of its shares of the energy."""
    joined = {}
    for name, first in found[0].items():
        looks = [layers[name] for layers in found if name in layers]
        shares = [look.top_share for look in looks if look.top_share is not None]
        share = statistics.fmean(shares) if shares else None
        repeated = statistics.fmean(look.repeated for look in looks)
        is_dead = all(look.is_dead for look in looks)
        joined[name] = replace(first, is_dead=is_dead, top_share=share, repeated=repeated)
    return joined


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # of Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return math.floor(most * (1 if sys.platform == "darwin" else 1024)) if device.type == "cpu" else None
