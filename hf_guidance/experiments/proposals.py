"""A setting of guidance proposed from measurements, with one sentence for each choice.

The rules follow the grid of measures in recipes/LOG.md and the thresholds of `analysis/first_warnings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from hf_guidance.analysis.first_batch import TOP
from hf_guidance.analysis.first_warnings import FULL, HELPED, LARGE_SHARE
from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.best_measure import OF_SKETCHES, best_measure
from hf_guidance.experiments.guidance_measuring import TOKEN_PENALTY
from hf_guidance.experiments.measurements import Measurements
from hf_guidance.mapping import parse_pair
from hf_guidance.similarity.registry import MEASURES, min_samples

Trial: TypeAlias = Callable[[GuidanceConfig], "Measurements | str"]
DOMINATES = 0.5  # share of the guide's forward in a guided step above which it is made cheaper
MOST_SKIPPED = 4  # first positions that are tried
CACHE, SKETCH, SPARSEST = "guide_cache", 1024, 4


@dataclass(frozen=True)
class DataFacts:
    """The facts about the data that the proposal needs.

    Args:
        rows: Rows of a batch.
        positions: Tokens of a row, if both networks see the same ones; else 1.
        has_batch_norm: Whether the guide has batch norm.
        ids: Column that numbers the rows, if features of the guide may be cached under it; else None.
        epochs: How often training will see each row; None if unknown.
    """

    rows: int
    positions: int = 1
    has_batch_norm: bool = False
    ids: str | None = None
    epochs: float | None = None


class Proposal:
    """A setting that is built up choice by choice.

    Args:
        config: The setting to begin with, of the trainer.
        start: Measurements of it.
        data: Facts about the data.
        trial: Measures another setting, or returns why it cannot be.

    Attributes:
        config: The setting so far.
        measured: Measurements of it.
        reasons: Field of the config → why it has its value, in one sentence.
    """

    def __init__(self, config: GuidanceConfig, start: Measurements, data: DataFacts, trial: Trial) -> None:
        self.config, self.measured, self.data, self.trial = config, start, data, trial
        self.reasons: dict[str, str] = {}
        for choose in (
            self._sample_axis,
            self._guide_batch_norm,
            self._skip_first_positions,
            self._measure,
            self._layers,
            self._cost,
            self._weight,
        ):
            choose()

    def _try(self, **fields: Any) -> str:
        """Change fields if the setting can be measured with them; return why it cannot, or nothing."""
        try:
            config = replace(self.config, **fields)
        except ValueError as error:
            return str(error)
        found = self.trial(config)
        if isinstance(found, str):
            return found
        self.config, self.measured = config, found
        return ""

    def _sample_axis(self) -> None:
        axis, data = self.config.sample_axis, self.data
        if axis != "sequence":
            self.reasons["sample_axis"] = f"The trainer has it, with {self.measured.samples_in_words()}."
        elif data.positions == 1:
            self.reasons["sample_axis"] = (
                f"Rows are the samples, {data.rows} a batch: the networks have no tokens in common."
            )
        elif why := self._try(sample_axis="token", ridge_penalty=None):
            self.reasons["sample_axis"] = f"Rows are the samples, as tokens cannot be: {why.rstrip('.')}."
        else:
            self.reasons["sample_axis"] = (
                f"Both networks see the same tokens, which give {self.measured.samples()} samples a batch where rows "
                f"give {data.rows}."
            )

    def _guide_batch_norm(self) -> None:
        mode, dead, layers = self.config.guide_batch_norm, self.measured.dead(), len(self.measured.guides)
        if not self.data.has_batch_norm:
            return
        said = f"No layer of the guide is dead with {mode}."
        if dead:
            said = f"{len(dead)} of {layers} guide layers are dead with {mode}, and no other mode revives them."
        for other in ("calibrated", "batch") if dead and mode == "eval" else ():
            before = self.config, self.measured
            if self._try(guide_batch_norm=other):
                continue
            if len(left := self.measured.dead()) < len(dead):
                said = f"{len(dead)} of {layers} guide layers are dead with {mode} and {len(left)} with {other}."
                break
            self.config, self.measured = before
        self.reasons["guide_batch_norm"] = said

    def _skip_first_positions(self) -> None:
        now, before = self.config.skip_first_positions, (self.config, self.measured)
        if self.config.sample_axis == "sequence":
            return
        few = f"{100 * TOP:.0f} % of"
        shares_of, which = next(
            (
                found
                for found in ((_massive, f"{few} the samples"), (_repeated, "samples with a copy"))
                if found[0](self.measured)
            ),
            (None, ""),
        )
        if shares_of is None:
            self.reasons["skip_first_positions"] = f"No layer has more than half of its energy in {few} its samples."
            return
        shares = shares_of(self.measured)
        told = f"{which[0].upper()}{which[1:]} hold up to {100 * max(shares):.0f} % of the energy"
        for count in range(now + 1, now + 1 + MOST_SKIPPED):
            if self._try(skip_first_positions=count):
                break
            if 2 * len(left := shares_of(self.measured)) <= len(shares):
                first = "position" if count == 1 else f"{count} positions"
                rest = f"without the first {first} of each row in {len(left)}"
                self.reasons["skip_first_positions"] = (
                    f"{told} in {len(shares)} layer{'s' if len(shares) > 1 else ''}, {rest}."
                )
                return
        self.config, self.measured = before
        look = "outliers" if shares_of is _massive else "rows that are copies"
        self.reasons["skip_first_positions"] = f"{told}, but not at the start of rows: look for {look}."

    def _measure(self) -> None:
        config, found = self.config, self.measured
        if config.measure not in MEASURES:
            self.reasons["measure"] = "It is a measure of your own, which is left as it is."
            return
        measure, said = best_measure(found)
        if found.samples() < min_samples(measure):
            measure, said = config.measure, f"A batch has {found.samples()} samples, too few for {measure}"
        loo_of_tokens = measure == "ridge_loo" and config.sample_axis == "token"
        start = found.mean(measure)
        if start is not None and start > FULL:
            said += f"; as it starts at {start:.2f} too, the two networks are alike and there is little to learn"
        self.config = replace(config, measure=measure, ridge_penalty=TOKEN_PENALTY if loo_of_tokens else None)
        self.reasons["measure"] = f"{said}."

    def _layers(self) -> None:
        dead, found = self.measured.dead(), self.measured
        live = [name for name in found.guides if name not in dead]
        field = "guide_layers" if self.config.layer_pairs is None else "layer_pairs"
        if not dead:
            said = f"None of the guide's {len(found.guides)} layers is dead, so that all are compared."
        elif not live:
            said = "Every layer of the guide is dead, so that it can teach nothing: choose another guide or its inputs."
        else:
            pairs = self.config.layer_pairs
            kept = live if pairs is None else [text for text in pairs if parse_pair(text)[1] not in dead]
            why = self._try(**{field: kept})
            said = f"{len(dead)} of {len(found.guides)} guide layers are dead, and are left out."
            said = f"{len(dead)} guide layers are dead, but cannot be left out: {why}" if why else said
        self.reasons[field] = said

    def _cost(self) -> None:
        config, cost, data = self.config, self.measured.cost, self.data
        share = f"The guide's forward is {100 * cost.guide_share():.0f} % of a guided step"
        cheaper = config.guide_rows or config.cache_guide or config.guidance_every > 1
        if cheaper or cost.guide_share() <= DOMINATES:
            end = "and the trainer makes it cheaper already" if cheaper else "so that it may run at every step"
            self.reasons["guidance_every"] = f"{share}, {end}."
            return
        fewer = data.rows // 4
        as_many = config.sample_axis == "token" and fewer * data.positions >= self.measured.samples()
        if as_many and not self._try(guide_rows=fewer):
            self.reasons["guide_rows"] = f"{share}, and a quarter of the rows has as many tokens as are compared."
            return
        of_rows = config.sample_axis == "sequence"
        if of_rows and data.ids is not None and (data.epochs or 0) >= 2 and self._cache(data.ids):
            self.reasons["cache_guide"] = f"{share}, and over {data.epochs:.1f} epochs it then runs once a row."
            return
        every = min(SPARSEST, max(2, math.ceil((cost.guide + cost.guidance) / max(cost.target, 1e-12))))
        self.config = replace(config, guidance_every=every)
        more = " (with a column of ids and a sketch, cache_guide would run it once a row)" if of_rows else ""
        self.reasons["guidance_every"] = f"{share}, so that it runs at one of {every} steps{more}."

    def _cache(self, ids: str) -> bool:
        """Cache the guide's features, if that is possible with them."""
        others = {"measure": "debiased_cka", "ridge_penalty": None, "sample_id_column": ids}
        if self._try(cache_guide=CACHE, sketch=self.config.sketch or SKETCH, **others):
            return False
        self.reasons["measure"] = f"The cache keeps a sketch, and {OF_SKETCHES}."
        return True

    def _weight(self) -> None:
        found = self.trial(self.config)  # all batches, with the measure that was chosen
        self.measured = self.measured if isinstance(found, str) else found
        weight, ratio = self.config.guidance_weight or 1.0, self.measured.gradient_ratio
        if ratio is None or not ratio.mean:
            why = self.measured.not_measured or "guidance has no gradient"
            self.reasons["guidance_weight"] = f"The gradients of both losses could not be compared ({why})."
        elif HELPED[0] <= weight * ratio.mean <= HELPED[1]:
            self.reasons["guidance_weight"] = (
                f"Guidance's gradient is then {_digits(weight * ratio.mean)} times the task's, as where guidance has "
                f"helped ({HELPED[0]:g} to {HELPED[1]:g})."
            )
        else:
            now = f"At weight {weight:g} guidance's gradient is {_digits(weight * ratio.mean)} times the task's"
            weight = float(f"{1 / ratio.mean:.1g}")
            self.reasons["guidance_weight"] = f"{now}; here both are about equal."
        self.config = replace(self.config, guidance_weight=weight)


def ordered(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reasons in the order of the fields of `GuidanceConfig`."""
    return {name: reasons[name] for name in GuidanceConfig.__dataclass_fields__ if name in reasons}


def _massive(found: Measurements) -> list[float]:
    """Return the share of the energy in few samples, for each layer where it is more than half."""
    shares = [look.top_share or 0.0 for side in (found.targets, found.guides) for look in side.values()]
    return [share for share in shares if share > LARGE_SHARE]


def _repeated(found: Measurements) -> list[float]:
    """Return the share of the energy in samples with a copy, for each layer of the guide where it is more than half."""
    return [look.repeated for look in found.guides.values() if look.repeated > LARGE_SHARE]


def _digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"  # 150 rather than 1.5e+02
