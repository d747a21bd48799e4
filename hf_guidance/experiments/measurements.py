"""Measurements of guidance over several batches, as plain data: similarities, layers, gradients, cost of a step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from hf_guidance.analysis.first_batch import LayerLook
from hf_guidance.config import GuidanceConfig


@dataclass(frozen=True)
class Spread:
    """A mean over batches, and the standard deviation beside it; None for a single batch."""

    mean: float
    deviation: float | None = None


def spread_of(values: Iterable[float]) -> Spread:
    """Compute mean and sample standard deviation."""
    numbers = list(values)
    return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


@dataclass(frozen=True)
class PairMeasurement:
    """A pair of layers over several batches.

    Attributes:
        target: Name of the target's layer.
        guide: Name of the guide's layer.
        similarities: Measure → similarity, for each measure that applies.
    """

    target: str
    guide: str
    similarities: dict[str, Spread]

    def room(self, measure: str) -> float:
        """Return what is left to learn by a measure: 1 − similarity."""
        return 1.0 - self.similarities[measure].mean


@dataclass(frozen=True)
class StepCost:
    """The cost of a guided step without the optimizer's own, each a median over batches.

    Attributes:
        target: Seconds of the target's forward and backward with the task alone.
        guide: Seconds of the guide's forward.
        guidance: Seconds of all else that guidance adds: making and comparing layers, and its backward.
        memory: Peak bytes: of a GPU those allocated, of the CPU those that the process has held. None if unknown.
        device: The device. On a CPU the seconds are CPU time.
    """

    target: float
    guide: float
    guidance: float
    memory: int | None
    device: str

    def guide_share(self) -> float:
        """Return the share of the guide's forward in a guided step."""
        return self.guide / max(self.target + self.guide + self.guidance, 1e-12)


@dataclass(frozen=True)
class Measurements:
    """Measurements of one setting of guidance over several batches.

    Attributes:
        config: The setting. The guidance weight counts as 1.
        pairs: The pairs that are compared.
        targets: Target layer → its look. A layer is dead if it is so in every batch.
        guides: Guide layer → its look.
        gradient_ratio: Norm of guidance's gradient at weight 1 over that of the task's. None if not measured.
        gradient_cosine: Cosine of the angle between both.
        not_measured: Why there are no gradients; empty if there are.
        cost: The cost of a step.
        batches: Number of batches.
    """

    config: GuidanceConfig
    pairs: list[PairMeasurement]
    targets: dict[str, LayerLook]
    guides: dict[str, LayerLook]
    gradient_ratio: Spread | None
    gradient_cosine: Spread | None
    not_measured: str
    cost: StepCost
    batches: int

    def mean(self, measure: str) -> float | None:
        """Return the mean similarity of the pairs whose layers are not dead; None if the measure does not apply."""
        live = [p for p in self.pairs if not (self.targets[p.target].is_dead or self.guides[p.guide].is_dead)]
        values = [p.similarities[measure].mean for p in live or self.pairs if measure in p.similarities]
        return statistics.fmean(values) if values else None

    def dead(self) -> list[str]:
        """Return the names of the guide's layers that are dead."""
        return [name for name, look in self.guides.items() if look.is_dead]

    def samples(self) -> int:
        """Return the fewest samples of a target layer."""
        return min(look.samples for look in self.targets.values())

    def samples_in_words(self) -> str:
        """Write how many samples are compared at once."""
        return f"{self.samples()} samples a {'row' if self.config.sample_axis == 'within' else 'batch'}"

    def width(self) -> int:
        """Return the number of features of the widest target layer."""
        return max(look.features for look in self.targets.values())
