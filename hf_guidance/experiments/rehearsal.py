"""Checks of matched runs before any of them is trained: each trainer is made once, and compared with the first."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, set_seed

from hf_guidance.analysis.history import metrics_of
from hf_guidance.experiments.controls import MatchedRun, check_follows
from hf_guidance.experiments.run_training import RESULT
from hf_guidance.guide.forward import generator_for, guide_batch
from hf_guidance.guide.identity import fingerprint
from hf_guidance.guide.inputs import noise_like, vocabulary_size
from hf_guidance.trainer.checks import makes_batches
from hf_guidance.trainer.preparation import first_batches

LENGTHS = ("max_steps", "num_train_epochs")
MATCHED = (*LENGTHS, "per_device_train_batch_size", "gradient_accumulation_steps")


def checked_seeds(seeds: Sequence[int]) -> list[int]:
    """Return seeds as plain integers.

    Raises:
        ValueError: If there is none, or one that is no seed or named twice.
    """
    expected = "expected a list of whole numbers from 0 on, each once"
    try:
        found = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise ValueError(f"seeds are {seeds!r}; {expected}.") from error
    if not found or len(set(found)) < len(found) or not all(0 <= seed < 2**32 for seed in found):
        raise ValueError(f"seeds are {found}; {expected}.")
    return found


def check_rows(rows: Any, name: str) -> None:
    """Raise ValueError if rows to compare runs by are several datasets, or none."""
    if isinstance(rows, Mapping):
        raise ValueError(f"{name} holds several datasets ({', '.join(map(str, rows))}); runs are compared by one.")
    if hasattr(rows, "__len__") and not len(rows):
        raise ValueError(f"{name} has no rows, by which runs are compared.")


def rehearse(make_trainer: Callable[[MatchedRun], Trainer], runs: Sequence[MatchedRun], metric: str = "loss") -> None:
    """Make the trainers of the runs of a seed, the first of which is alone, and check that they can be compared.

    Nothing is done if all of them are finished.

    Args:
        make_trainer: As of `compare_runs`.
        runs: The runs.
        metric: Metric by which they are compared.

    Raises:
        ValueError: If a trainer does not follow its run, differs from the first one in more than guidance, or cannot
            give its guide what a control asks for, or an evaluation does not give the metric.
    """
    if all((Path(run.output_dir) / RESULT).is_file() for run in runs):
        return
    first: dict[str, Any] = {}
    for run in runs:
        set_seed(run.seed)
        trainer: Any = make_trainer(run)
        check_follows(trainer, run)
        check_rows(trainer.eval_dataset, "eval_dataset")
        facts = _facts(trainer)
        if not first:
            _check_metric(trainer, metric)
        first = first or facts
        _check_matches(run, facts, first)
        _check_noise(trainer)


def _facts(trainer: Any) -> dict[str, Any]:
    rows = trainer.train_dataset
    facts = {name: getattr(trainer.args, name) for name in MATCHED}
    facts["rows of train_dataset"] = len(rows) if hasattr(rows, "__len__") else None
    return facts | {"initial weights": fingerprint(trainer.model)}


def _check_metric(trainer: Any, metric: str) -> None:
    """Raise ValueError if an evaluation of the first rows does not give the metric."""
    rows = trainer.eval_dataset
    if metric == "loss" or not hasattr(rows, "__len__"):
        return
    few = [rows[i] for i in range(min(len(rows), trainer.args.per_device_eval_batch_size))]
    try:
        found = metrics_of({"step": 0, **trainer.predict(few, metric_key_prefix="eval").metrics}, "eval")
    except Exception:  # of a metric that needs more rows
        return
    if metric not in found:
        raise ValueError(f"metric is {metric!r}, but the evaluation gives {', '.join(found)}: name one of these.")


def _check_matches(run: MatchedRun, facts: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if value == first[name] or (run.max_steps is not None and name in LENGTHS):
            continue
        said = "" if name == "initial weights" else f" ({first[name]} and {value})"
        remedy = "give both the same" if said else "draw the target's weights first, from the seed of the run"
        raise ValueError(
            f"make_trainer gives the runs 'alone' and {run.name!r} of seed {run.seed} other {name}{said}, so that more "
            f"than guidance would differ: {remedy}."
        )


def _check_noise(trainer: Any) -> None:
    """Raise ValueError if the guide should see noise, which the first batch cannot be replaced by."""
    rows = trainer.train_dataset
    if getattr(trainer, "guide", None) is None or trainer.guidance.guide_input != "noise":
        return
    if rows is None or hasattr(rows, "__next__") or makes_batches(trainer):
        return
    batch = next(first_batches(trainer, rows), None)
    if batch is not None:
        inputs = guide_batch(batch, trainer.guidance_loss.target, trainer.guide)
        noise_like(inputs, vocabulary_size(trainer.guide), generator_for(0))
