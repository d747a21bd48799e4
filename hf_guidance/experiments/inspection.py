"""A look at target, guide and data at length, before any training, with a setting of guidance that it proposes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from hf_guidance.analysis.first_batch import DEBIASED, FirstLook, PairLook
from hf_guidance.analysis.first_warnings import warnings_of
from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.guidance_measuring import measure_guidance
from hf_guidance.experiments.inspection_report import as_text, as_yaml
from hf_guidance.experiments.measurements import Measurements, PairMeasurement
from hf_guidance.experiments.proposals import DataFacts, Proposal, ordered
from hf_guidance.features.batch import Batch
from hf_guidance.features.rows import content_of
from hf_guidance.guide.forward import accepted_columns
from hf_guidance.guide.freezing import BATCH_NORM
from hf_guidance.guide.inputs import GUIDE_PREFIX
from hf_guidance.guide.random_state import kept_random_state
from hf_guidance.trainer.checks import makes_batches
from hf_guidance.trainer.guidance_mixin import GuidanceMixin
from hf_guidance.trainer.preparation import first_batches

REPORT, SETTINGS = "inspection.json", "guidance.yaml"
IDS = ("id", "sample_id")  # columns that may number the rows


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`; as a string a report to read.

    Attributes:
        target: Class of the target.
        guide: Class of the guide.
        rows: Rows of a batch.
        measured: Measurements of the trainer's own setting.
        proposal: The setting that is proposed, for the same trainer.
        reasons: Field of the proposal → why it has its value, in one sentence.
        proposed: Measurements of the proposal.
        warnings: Whatever is likely to spoil a run with the trainer's own setting, each with a remedy.
    """

    target: str
    guide: str
    rows: int
    measured: Measurements
    proposal: GuidanceConfig
    reasons: dict[str, str]
    proposed: Measurements
    warnings: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> list[PairMeasurement]:
        """Return the pairs of the trainer's own setting, each with its similarities."""
        return self.measured.pairs

    def __str__(self) -> str:
        networks = self.target, self.guide
        return as_text(networks, self.rows, self.measured, self.warnings, self.proposal, self.reasons)

    def to_yaml(self) -> str:
        """Write the proposal as YAML, which `--config` of a recipe and `HfArgumentParser.parse_yaml_file` read."""
        return as_yaml(self.proposal, self.reasons)

    def save(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write the proposal as guidance.yaml, and all numbers as inspection.json.

        Args:
            folder: Folder to write to; made if it is not there.

        Returns:
            Paths of both files.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / SETTINGS).write_text(self.to_yaml(), encoding="utf-8")
        (place / REPORT).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return place / SETTINGS, place / REPORT


def inspect(trainer: GuidanceMixin, *, batches: int = 4) -> Inspection:
    """Measure guidance over some batches of a trainer's training data, and propose a setting. Nothing is trained.

    It measures each pair by every measure that applies, dead layers and massive samples, guidance's gradient beside the
    task's, and the cost of a step by its parts. Weights, buffers, gradients and random states stay as they are. Rows of
    a dataset are drawn at random by the trainer's seed; those of a stream are its first.

    Args:
        trainer: A `GuidanceTrainer`, or another Trainer behind `GuidanceMixin`, before or after training.
        batches: Number of batches to measure.

    Returns:
        Measurements and proposal.

    Raises:
        ValueError: If the trainer has no guide, runs in several processes or makes its batches itself, the data have
            no full batch or can be read only once, or a batch cannot be guided.

    Example:
        >>> found = inspect(trainer)  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        >>> trainer = GuidanceTrainer(..., guidance=found.proposal)  # doctest: +SKIP
    """
    _check(trainer, batches)
    with kept_random_state():
        read = _batches(trainer, batches)
        data = facts_of(trainer, read[0])
        known: dict[str, Measurements] = {}

        def measured(config: GuidanceConfig) -> Measurements:
            name = json.dumps(config.alone().to_dict())
            known[name] = known.get(name) or measure_guidance(trainer, config, read)
            return known[name]

        def trial(config: GuidanceConfig) -> Measurements | str:
            try:
                return measured(config)
            except ValueError as error:
                return str(error)

        start = measured(trainer.guidance)
        made = Proposal(trainer.guidance, start, data, trial)
    revived = data.has_batch_norm and made.config.guide_batch_norm != "eval"  # tried, where layers are dead
    warnings = warnings_of(_look(start), trainer.guidance, has_batch_norm=revived)
    networks = type(trainer.guidance_loss.target).__name__, type(trainer.guide).__name__
    return Inspection(*networks, data.rows, start, made.config, ordered(made.reasons), made.measured, warnings)


def _check(trainer: GuidanceMixin, batches: int) -> None:
    if not isinstance(trainer, GuidanceMixin):
        raise ValueError(f"inspect got a {type(trainer).__name__}; expected a GuidanceTrainer with a guide.")
    if trainer.guide is None:
        raise ValueError("the trainer has no guide, so that there is nothing to inspect: pass guide=load_guide(...).")
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches is {batches!r}; it must be a whole number, at least 1.")
    if trainer.model is not None and not any(weight.requires_grad for weight in trainer.model.parameters()):
        raise ValueError("no weight of the target is trained: set requires_grad of those that should be.")
    if trainer.args.world_size > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("inspect measures on one process, without FSDP or DeepSpeed: start it with plain python.")
    if makes_batches(trainer):
        raise ValueError(
            f"{type(trainer).__name__} makes its batches itself, in each step, as one that generates does; inspect "
            "needs them as the data collator returns them."
        )
    rows = trainer.train_dataset
    if rows is None:
        raise ValueError("the trainer has no training data to inspect: pass train_dataset.")
    if isinstance(rows, Mapping):
        raise ValueError(
            f"the training data are a {type(rows).__name__} with {', '.join(map(str, rows))}; expected rows: choose a "
            "split."
        )
    if hasattr(rows, "__next__"):
        raise ValueError(
            f"the training data ({type(rows).__name__}) can be read only once, and training would miss what inspect "
            "reads: pass a dataset, or an IterableDataset that begins anew each time."
        )


def _batches(trainer: GuidanceMixin, count: int) -> list[dict[str, Any]]:
    """Read batches of rows drawn at random, or the first ones of a stream, and move them to the trainer's device."""
    rows: Any = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        random = torch.Generator().manual_seed(trainer.args.seed)
        order = torch.randperm(len(rows), generator=random).tolist()[: count * size]
        rows = rows.select(order) if hasattr(rows, "select") else Subset(rows, order)
    try:
        read = list(islice(first_batches(trainer, rows), count))
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"the training data do not make a batch ({type(error).__name__}: {said[:200]}): pass a data_collator, such "
            "as DataCollatorWithPadding(tokenizer) for texts of several lengths."
        ) from error
    found = [trainer._prepare_inputs(batch) for batch in read]
    if not found:
        count = len(rows) if hasattr(rows, "__len__") else 0
        there = f"have {count} row{'' if count == 1 else 's'}" if hasattr(rows, "__len__") else "end early"
        raise ValueError(
            f"the training data {there}, fewer than one batch of {size}: lower per_device_train_batch_size, or give "
            "more rows."
        )
    return found


def facts_of(trainer: GuidanceMixin, batch: Batch) -> DataFacts:
    """Collect the facts about a trainer's data that a proposal needs, with its first batch."""
    ids = batch.get("input_ids")
    own = any(name.startswith(GUIDE_PREFIX) for name in batch)
    same = isinstance(ids, Tensor) and ids.ndim == 2 and not own and "input_ids" in accepted_columns(trainer.guide)
    rows: Any = trainer.train_dataset
    count = len(rows) if hasattr(rows, "__len__") else None
    seen = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.max_steps
    epochs = trainer.args.num_train_epochs if trainer.args.max_steps <= 0 else seen / count if count else None
    return DataFacts(
        rows=len(content_of(batch)),
        positions=ids.shape[1] if same and isinstance(ids, Tensor) else 1,
        has_batch_norm=any(isinstance(module, BATCH_NORM) for module in trainer.guide.modules()),
        ids=_column_of_ids(rows) if count and "attention_mask" not in batch else None,
        epochs=epochs if count else None,
    )


def _column_of_ids(rows: Any) -> str | None:
    """Return the column that numbers the rows from 0; None if there is none."""
    first, last = rows[0], rows[len(rows) - 1]
    if not (isinstance(first, Mapping) and isinstance(last, Mapping)):
        return None
    numbered = ((name, np.asarray(first.get(name)), np.asarray(last.get(name))) for name in IDS)
    return next(
        (name for name, one, other in numbered if one.ndim == 0 and (one == 0) and other == len(rows) - 1), None
    )


def _look(found: Measurements) -> FirstLook:
    """Make the look at the start of training of measurements over several batches."""
    config, measure = found.config, found.config.resolved_measure()
    pairs = [
        PairLook(p.target, p.guide, p.similarities[measure].mean, p.similarities[DEBIASED].mean)
        if DEBIASED in p.similarities
        else PairLook(p.target, p.guide, p.similarities[measure].mean, None)
        for p in found.pairs
    ]
    weight = config.guidance_weight
    ratio = weight * found.gradient_ratio.mean if found.gradient_ratio else None
    return FirstLook(
        measure, config.sample_axis, weight, config.guidance_reduction, pairs, found.targets, found.guides, ratio
    )
