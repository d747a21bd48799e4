"""`GuidanceLoss`: the guidance term of the loss, with or without a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.features.batch import Batch, is_packed
from hf_guidance.features.choices import choose_rows
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.distributed import ranks_of
from hf_guidance.features.gradients import reaches_weights
from hf_guidance.features.inside import check_is_network, holds_transformer, transformer_in
from hf_guidance.features.layer_stacks import in_words
from hf_guidance.features.masks import warn_if_added
from hf_guidance.features.mismatches import why_too_few
from hf_guidance.features.reader import LayerReader
from hf_guidance.features.rows import side_of, tensors_of
from hf_guidance.features.samples import Samples
from hf_guidance.guide.forward import (
    GuideRunning,
    forward,
    generator_for,
    rows_for_guide,
    seen_by_target,
    without_guide,
)
from hf_guidance.guide.freezing import check_apart, check_types, freeze
from hf_guidance.guide.inputs import noise_like, vocabulary_size
from hf_guidance.guide.own_base import OwnBase
from hf_guidance.guide.sharding import shard
from hf_guidance.mapping import Pair, pair_layers, pair_name, pair_weight, parse_pair
from hf_guidance.schedule import Schedule, Weights, make_schedule
from hf_guidance.similarity.cosines import agreement_of_halves
from hf_guidance.similarity.pair_loss import Groups, guidance_loss_of_groups
from hf_guidance.similarity.registry import Measure, check_takes_sketch, get_measure, primal_below_of
from hf_guidance.similarity.sketch import Sketch

logger = logging.getLogger(__name__)

NOISE = 0.25  # agreement of a sketch's halves below which similarities are mostly noise


@dataclass
class Watched:
    """Result of one watched forward.

    Attributes:
        inputs: Inputs to run the target on: the batch, or noise during pre-alignment on noise.
        weights: Weights of guidance and task at this step.
        loss: Weighted sum or mean over the pairs of (1 − similarity), a scalar. None if the step is not guided. With
            `similarity_batch="global"` its gradient suits a wrapper that averages gradients over the ranks.
        similarities: Measure → pair → similarity, detached. The measure trained on comes first.
        why_unguided: Why there is no loss although guidance has a weight, and what to do about it.
        skipped_pairs: Number of pairs left out because LayerDrop skipped their target layer.
        rows: Number of rows that are compared by themselves (`sample_axis="within"`), else 1: the weight of this loss
            in a mean over micro-batches and processes.
        layers: Layers of target and guide by name, if `GuidanceLoss.keeps_layers` is set; else None.
    """

    inputs: dict[str, Any]
    weights: Weights
    loss: Tensor | None = None
    similarities: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    why_unguided: str = ""
    skipped_pairs: int = 0
    rows: int = 1
    layers: tuple[Groups, Groups] | None = None

    def total(self, task_loss: Tensor) -> Tensor:
        """Return the loss to train on: the weighted sum of the task loss and the guidance loss.

        Args:
            task_loss: The target's own loss, a scalar.
        """
        total = task_loss if self.weights.task == 1 else self.weights.task * task_loss
        return total if self.loss is None else total + self.weights.guidance * self.loss.to(total.device)


class GuidanceLoss:
    """Guidance of a target by a frozen guide: watches the target's forward and compares its layers with the guide's.

    Args:
        target: Network being trained, without a wrapper such as DDP. Of a sentence-transformers model, the transformer
            inside is watched, and each forward by `watch_each`.
        guide: Network to guide it, or the target's own base by `load_guide_of_base`. It is frozen here, in place.
        config: Settings of guidance; the defaults if None.
        seed: Seed of noise, shuffling and the choice of tokens, combined with step, micro-step and rank.
        autocast: Makes the context of the guide's forward. By default the guide runs in the surrounding context.
        total_steps: Optimizer steps of the run. A decay without `guidance_stop_step` ends here.

    Attributes:
        stopped_at: Optimizer step from which guidance is off for good; None while it is not. `GuidanceTrainer` sets it
            for `guidance_stop_similarity`; in a loop of your own, set it yourself.

    Raises:
        ValueError: If target or guide is no network, a layer does not exist, guide and target share parameters, a
            global batch meets LayerDrop or several processes without a group, a measure takes no sketch, or the warm-up
            is longer than the run. On the first batch: the vocabularies or the samples of the two networks do not
            match, or `skip_first_positions` leaves none or finds none.

    Example:
        >>> guidance = GuidanceLoss(target, guide, GuidanceConfig(measure="debiased_cka"))  # doctest: +SKIP
        >>> with guidance.watch(batch, step=step) as watched:  # doctest: +SKIP
        ...     outputs = target(**watched.inputs)
        >>> loss = watched.total(outputs.loss)  # doctest: +SKIP
    """

    def __init__(
        self,
        target: nn.Module,
        guide: nn.Module,
        config: GuidanceConfig | None = None,
        *,
        seed: int = 0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        total_steps: int | None = None,
    ) -> None:
        check_is_network(target, "target")
        check_types(guide, config)
        target, guide = transformer_in(target), transformer_in(guide, "guide")
        self.target, self.guide, self.config = target, guide, (config or GuidanceConfig()).resolved()
        self.seed, self.autocast, self.total_steps = seed, autocast, total_steps
        self.stopped_at: int | None = None
        if total_steps is not None:
            self.schedule()  # raises for a warm-up that is too long
        check_apart(target, guide)
        if isinstance(guide, OwnBase):
            guide.check(self.config)
        freeze(guide, self.config.guide_batch_norm)
        if self.config.shard_guide:
            shard(guide)
        names = [self.config.measure, *self.config.log_measures]
        self.measures: list[Measure] = [get_measure(n, self.config.ridge_penalty) for n in dict.fromkeys(names)]
        self._primal_below = [primal_below_of(self.measures, of_guide) for of_guide in (False, True)]
        for measure in self.measures if self.config.sketch is not None else ():
            check_takes_sketch(measure)
        self.sketch = None if self.config.sketch is None else Sketch(self.config.sketch, "target")
        self.pairs: list[Pair] | None = None  # set on the first batch, which shows how many hidden states there are
        self._reaches_weights = False  # set once a gradient is seen to reach a weight
        self.keeps_layers = False  # in `Watched`, which takes memory
        explicit = [parse_pair(text) for text in self.config.layer_pairs or []]
        compared = _layers(explicit, 0) or self.config.target_layers
        self._sides = {side_of(layer) for layer in compared}
        self.target_reader = LayerReader(target, compared, "target")
        self.guide_reader = LayerReader(guide, _layers(explicit, 1) or self.config.guide_layers, "guide")
        self.target_reader.layer_drop.check_similarity_batch(self.config.similarity_batch)
        readers = self.target_reader, self.guide_reader
        full: list[Pair] = [(readers[0].full_name(ours), readers[1].full_name(theirs)) for ours, theirs in explicit]
        if repeated := [ours for ours in full if full.count(ours) > 1]:
            raise ValueError(
                f"layer_pairs names the pair {pair_name(repeated[0])} twice, by two names of a layer: leave one out."
            )
        self._pair_weights = dict(zip(full, map(pair_weight, self.config.layer_pairs or []), strict=True))
        self._conventions = [Conventions(r.model, r.modules, self.config.feature_layout, r) for r in readers]
        self.ranks = ranks_of(self.config.similarity_batch)
        self.running = GuideRunning(self.guide_reader, target, self.config, autocast)

    def weights(self, step: int) -> Weights:
        """Return the weights of guidance and task at an optimizer step.

        Args:
            step: Optimizer steps already taken.
        """
        return self.schedule()(step)

    def schedule(self) -> Schedule:
        """Make the function from the optimizer step to these weights."""
        config = self.config
        return make_schedule(
            config.guidance_schedule,
            config.guidance_weight,
            stop_step=config.guidance_stop_step,
            prealign_steps=config.prealign_steps,
            warmup_steps=config.guidance_warmup_steps,
            every=config.guidance_every,
            total_steps=self.total_steps,
            stopped_at=self.stopped_at,
        )

    @contextmanager
    def watch(
        self,
        batch: Batch,
        *,
        step: int = 0,
        micro_step: int = 0,
        rank: int = 0,
        log: bool = True,
        weights: Weights | None = None,
    ) -> Iterator[Watched]:
        """Run the guide on a batch, then watch the one forward of the target inside the `with` block.

        If the guidance weight is 0 at this step, the guide does not run and the target is not watched. The layers are
        compared when the block ends: do not change the target's outputs in place before the backward.

        Args:
            batch: Inputs of the target, with `guide_*` columns if the guide needs its own.
            step: Optimizer steps already taken. The weights depend on it.
            micro_step: Index of the micro-batch in this optimizer step.
            rank: Index of this process. All randomness is a function of the seed, step, micro-step and rank.
            log: Whether to compute the config's `log_measures` too.
            weights: Weights of guidance and task to use instead of those of the step, as to measure without training.

        Yields:
            The inputs to run the target on. Its loss and similarities are filled in when the block ends.

        Raises:
            ValueError: If the target did not run in the block, or its layers do not match the guide's. Also if no
                target layer in a pair carries a gradient to a weight.
        """
        key, weights = (self.seed, step, micro_step, rank), weights or self.weights(step)
        if not weights.guidance:
            yield Watched(without_guide(batch, self.config.sample_id_column), weights)
            return
        if not weights.task and self.config.guide_input == "prealign_noise":
            batch = noise_like(batch, self._common_vocabulary(), generator_for(*key))
        config = self.config
        seen = seen_by_target(batch, self.target)
        rows = self._rows_of(seen, step, micro_step, rank)
        samples = self.samples_of(seen, step=step, micro_step=micro_step, rank=rank, rows=rows)
        watched = Watched(without_guide(batch, self.config.sample_id_column), weights)
        measure, needed = self.measures[0].name, self.measures[0].min_samples
        too_few = samples.count < {"sequence": needed, "token": 1, "within": 1}[config.sample_axis]
        if too_few and not config.shard_guide:  # a sharded guide runs on all ranks or on none
            watched.why_unguided = why_too_few(config.sample_axis, measure, needed, samples.count, is_packed(seen))
        elif (why := samples.why_too_short(needed)) and not config.shard_guide:
            if self.pairs is None and not step and samples.leaves_none():  # later ones may be short by chance
                raise ValueError(f"{why}.")
            watched.why_unguided = why
        elif config.guide_input == "shuffled" and min(samples.rows_in_batch, samples.batch_size) < 2:
            watched.why_unguided = (
                "guide_input='shuffled' exchanges the rows of a batch, but this batch has only one row"
            )
        if watched.why_unguided:
            yield watched
            return
        if config.guide_input == "shuffled":
            batch = self.running.shuffled(batch, key)
        given, rows = rows_for_guide(batch, rows)
        guide = self.running.layers(given, key, partial(self.samples_of, like=samples, rows=rows))
        with self.target_reader.reading(samples.layers) as layers:
            yield watched
        self.compare(watched, (samples, layers), guide, log=log)
        self.target_reader.settle_batch_first()
        self.guide_reader.settle_batch_first()

    def rows_to_compare(self, batch: Batch, *, step: int, micro_step: int, rank: int = 0) -> int:
        """Count the rows of a batch that `watch` will compare by themselves with `sample_axis="within"`."""
        seen = seen_by_target(batch, self.target)
        rows = self._rows_of(seen, step, micro_step, rank)
        return self.samples_of(seen, step=step, micro_step=micro_step, rank=rank, rows=rows).count

    def _rows_of(self, batch: Batch, *place: int) -> Tensor | None:
        if self.config.guide_rows is None:
            return None
        if is_packed(batch):
            raise ValueError(
                "guide_rows runs the guide on some rows, but this batch is one row of packed documents: pad the "
                "rows, or leave guide_rows out."
            )
        if self.ranks:
            place = (*place[:2], 0)  # all ranks choose their rows together
        seed = generator_for(self.seed, *place, 3).initial_seed()
        return choose_rows(batch, self.config.guide_rows, seed, self.ranks)

    def samples_of(
        self,
        batch: Batch,
        like: Samples | None = None,
        step: int = 0,
        micro_step: int = 0,
        rank: int = 0,
        rows: Tensor | None = None,
    ) -> Samples:
        """Make the samples of a batch.

        Args:
            batch: Inputs of a network.
            like: Samples of the target, for those of the guide, which take over their choice of tokens.
            step: Optimizer steps already taken.
            micro_step: Index of the micro-batch in this optimizer step.
            rank: Index of this process.
            rows: Indices of the rows to compare; None for all.

        Raises:
            ValueError: All that `Samples` raises.
        """
        if like is None and self.pairs is None and holds_transformer(self.target):  # on the first batch
            warn_if_added(tensors_of(batch))
        place = (self.seed, step, micro_step, 0 if self.ranks else rank)  # all ranks choose their tokens together
        options: dict[str, Any] = {"like": like, "seed": generator_for(*place).initial_seed(), "ranks": self.ranks}
        options["sketch"] = self.sketch if like is None else self.running.sketch
        options |= {"skip_first": self.config.skip_first_positions, "rows": rows}
        options |= {"least": self.measures[0].min_samples, "sides": self._sides}
        return Samples(
            batch,
            self.config.sample_axis,
            self.config.max_tokens,
            primal_below=self._primal_below[like is not None],
            conventions=self._conventions[like is not None],
            **options,
        )

    def forward_guide(self, inputs: Batch) -> Any:
        """Run the guide on those of the inputs that it accepts, moved to its device.

        Args:
            inputs: Columns of a batch.

        Returns:
            Output of the guide.

        Raises:
            ValueError: If the guide accepts none of the inputs, lacks decoder inputs, or gets images of a size it does
                not accept.
        """
        return forward(self.guide, inputs)

    def open_cache(self, batch: Batch, rows: int, identity: Mapping[str, Json], create: bool = True) -> None:
        """Open or create the cache that the config's `cache_guide` names. Call it once, before the first step.

        Args:
            batch: First rows of the data. They give the widths and scales of the layers.
            rows: Number of samples in the data. Their ids are 0 to `rows` − 1.
            identity: JSON values that tell this guide from any other.
            create: Whether this process may create the folder. Of several processes, one should.

        Raises:
            ValueError: If the batch has no ids, or has padding. Also all that `GuideCache` raises.
        """
        self.running.open_cache(batch, rows, identity, create)

    def attach(self) -> None:
        """Put the hooks on both networks, unless they are there. `watch` does so by itself."""
        self.target_reader.attach()
        self.guide_reader.attach()

    def close(self) -> None:
        """Remove the hooks from both networks. The next `watch` puts them back."""
        self.target_reader.remove()
        self.guide_reader.remove()

    def _common_vocabulary(self) -> int | None:
        sizes = [size for size in (vocabulary_size(self.target), vocabulary_size(self.guide)) if size]
        return min(sizes, default=None)

    def _resolve_pairs(self, layers: Groups, padded: bool) -> None:
        targets, guides = self.target_reader.names(), self.running.names()
        if self.config.layer_pairs is not None:
            self.pairs = list(self._pair_weights)
        else:
            self.pairs = pair_layers(targets, guides, self.config.layer_mapping)
        all_seen = all(target in layers for target, _ in self.pairs)
        widest = max(sketch.widest for sketch in (self.sketch, self.running.sketch) if sketch) if self.sketch else 0
        if self.sketch and all_seen and not padded and widest <= self.sketch.size:
            cache = self.config.cache_guide
            raise ValueError(
                f"sketch is {self.config.sketch}, but the widest layer that is compared has {widest} features: there "
                "is nothing to sketch. Lower sketch, or leave it out to compare exactly."
                + (f" In both cases remove {cache}, which was made with this sketch." if cache else "")
            )
        self.target_reader.keep = {target for target, _ in self.pairs}
        self.guide_reader.keep = {guide for _, guide in self.pairs}

    def _check_skips(self, *both: Samples) -> None:
        if self.config.skip_first_positions and not any(samples.has_skipped for samples in both):
            raise ValueError(
                f"skip_first_positions is {self.config.skip_first_positions}, but no layer that is compared has "
                "positions (batch, length, d) to leave out: leave the setting out."
            )

    def _warn_of_noise(self, targets: Groups, guides: Groups) -> None:
        layers = [
            side[name][0]
            for pair in self.pairs or []
            for side, name in zip((targets, guides), pair, strict=True)
            if name in side
        ]
        debiased = any(measure.name == "debiased_cka" for measure in self.measures)
        least = min((agreement_of_halves(layer, debiased) for layer in layers), default=1.0)
        if least < NOISE:
            logger.warning(
                "sketch=%d is small for these layers: two halves of it agree to %.0f %% on the geometry of a layer, so "
                "that %s is mostly noise. Raise sketch, or leave it out%s.",
                self.config.sketch,
                100 * max(least, 0.0),
                "debiased_cka" if debiased else self.measures[0].name,
                ", or use linear_cka without log_measures" if debiased else "",
            )

    def compare(
        self,
        watched: Watched,
        target: tuple[Samples, Groups],
        guide: tuple[Samples, Groups],
        *,
        log: bool = True,
        scale: float = 1.0,
    ) -> None:
        """Compute loss and similarities from the layers of both networks, and store them in `watched`.

        Args:
            watched: Result to fill in.
            target: The target's samples, and its layers by name, one for each group of samples.
            guide: The guide's samples, and its layers by name, likewise.
            log: Whether to compute the config's `log_measures` too.
            scale: Factor of the gradient, not of the value.

        Raises:
            ValueError: As `watch` does.
        """
        (samples, targets), (guide_samples, guides) = target, guide
        watched.layers = (targets, guides) if self.keeps_layers else None
        reader = self.target_reader
        if not (targets or reader.has_run()):
            raise ValueError(
                "the target did not run inside `watch`: run it in the `with` block, and the same network that this "
                "loss was made with."
            )
        is_first = self.pairs is None
        if is_first:
            self._check_skips(samples, guide_samples)
            self._resolve_pairs(targets, padded=bool(samples.masks))
            self._warn_of_noise(targets, guides)
        every = self.pairs or []
        pairs = [pair for pair in every if pair[0] in targets]
        watched.skipped_pairs = len(every) - len(pairs)
        if watched.skipped_pairs:
            reader.check_skipped([target for target, _ in every if target not in targets])
        weights = [self._pair_weights.get(pair, 1.0) for pair in pairs]
        if not any(weights):
            drop = in_words(reader.layer_drop.settings)
            which = "all pairs with a weight above 0" if pairs else "all pairs"
            watched.why_unguided = (
                f"LayerDrop skipped the target layers of {which} ({drop}): lower it, or compare more layers"
            )
            return
        samples.check_aligned(pairs, targets, guide_samples, guides)
        n = min(max(layer.samples for layer in targets[target]) for target, _ in pairs)
        trained_on, *logged = self.measures
        if n < trained_on.min_samples:
            watched.why_unguided = why_too_few(samples.axis, trained_on.name, trained_on.min_samples, n)
            return
        mean, scale = self.config.guidance_reduction == "mean", scale * (self.ranks.scale if self.ranks else 1)
        options: Any = {"weights": weights, "mean": mean, "scale": scale}
        watched.loss, values = guidance_loss_of_groups(pairs, trained_on, targets, guides, **options)
        watched.similarities[trained_on.name] = values
        watched.rows = samples.count if self.config.sample_axis == "within" else 1
        for measure in logged if log else ():
            if n >= measure.min_samples:
                with torch.no_grad():
                    values = guidance_loss_of_groups(pairs, measure, targets, guides)[1]
                watched.similarities[measure.name] = values
            elif is_first:
                logger.warning(
                    "%s is not logged: it needs %d samples, and %d are compared.", measure.name, measure.min_samples, n
                )
        if torch.is_grad_enabled() and not self._reaches_weights:
            self._reaches_weights = reaches_weights(watched.loss)
            if not self._reaches_weights:
                self._refuse_without_gradient(watched, sorted({target for target, _ in pairs}))

    def _refuse_without_gradient(self, watched: Watched, layers: list[str]) -> None:
        why = (
            f"none of the target layers {layers} carries a gradient to a weight: they are frozen, or run under "
            "reentrant activation checkpointing (set use_reentrant=False)"
        )
        if not watched.skipped_pairs:
            raise ValueError(f"{why}.")
        watched.loss, watched.why_unguided = None, why  # other layers run in other steps


def _layers(pairs: list[Pair], side: int) -> list[str]:
    return list(dict.fromkeys(pair[side] for pair in pairs))
