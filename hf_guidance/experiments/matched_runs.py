"""Matched runs of a user's own trainer: does guidance help it, at equal steps and at equal time?"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch.utils.data import Dataset
from transformers import Trainer, set_seed

from hf_guidance.analysis.curves import plot_comparison
from hf_guidance.analysis.history import metrics_of
from hf_guidance.experiments.baselines import equal_time as longer_run
from hf_guidance.experiments.controls import ALONE, CONTROLS, GUIDED, MatchedRun, check_follows
from hf_guidance.experiments.files import write_json
from hf_guidance.experiments.rehearsal import check_rows, checked_seeds, rehearse
from hf_guidance.experiments.report import Record, Row, comparison_rows
from hf_guidance.experiments.results_page import table_and_gains
from hf_guidance.experiments.run import Run, settings_of
from hf_guidance.experiments.run_training import result_of, train_and_record
from hf_guidance.experiments.verdicts import EQUAL_TIME, Difference, gains
from hf_guidance.features.batch import Batch
from hf_guidance.trainer.checks import check_writable
from hf_guidance.trainer.environment import environment
from hf_guidance.trainer.steps import TrainingClock

MakeTrainer: TypeAlias = Callable[[MatchedRun], Trainer]


@dataclass
class MatchedRuns:
    """The result of `compare_runs`; as a string its table, and the gains in words.

    Attributes:
        task: Name of the metric, whether it is a fraction and better if higher, and `data`: `test` or `validation`.
        runs: Records of all runs.
        table: One row for each kind of run, over its seeds.
        differences: Gains of the guided run, and of each control, over the target alone: paired over seeds, with an
            interval from three seeds on.
    """

    task: dict[str, Any]
    runs: list[Record]
    table: list[Row] = field(init=False)
    differences: list[Difference] = field(init=False)

    def __post_init__(self) -> None:
        self.table = comparison_rows(self.runs, metric=self.task["metric"])
        self.differences = gains(self.runs, self.task)

    def __str__(self) -> str:
        return table_and_gains(self.table, self.differences, self.task)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write results.json, results.md and comparison.png, the numbers first."""
        place, metric, percent = Path(folder), self.task["metric"], self.task["percent"]
        content: Any = {"environment": environment(), "task": self.task, "runs": self.runs}
        content |= {"table": self.table, "differences": self.differences}
        write_json(place / "results.json", content)
        (place / "results.md").write_text(f"{self}\n", encoding="utf-8")
        plot_comparison(self.runs, metric, place / "comparison.png", percent=percent)


def compare_runs(
    make_trainer: MakeTrainer,
    seeds: Sequence[int],
    controls: Sequence[str] = (),
    folder: str | os.PathLike[str] = "compare_runs",
    equal_time: bool = True,
    *,
    metric: str = "loss",
    percent: bool = False,
    higher_is_better: bool | None = None,
    test_dataset: Dataset[Any] | Sequence[Batch] | None = None,
) -> MatchedRuns:
    """Train a target alone and guided on the same seeds, and tell whether guidance helps.

    A run that is finished is read again, and one that was stopped resumes from its checkpoint: call this again with the
    same arguments.

    Args:
        make_trainer: Makes the trainer of a run. It passes `seed`, `output_dir` and, where it is set, `max_steps` of
            the run to `TrainingArguments`, a guide if the run is `guided`, and `run.guidance(config)` as its setting.
        seeds: Seeds; an interval needs three.
        controls: Guided runs beside it that should help less: `shuffled_guide`, `reversed_layers`,
            `noise_guide`.
        folder: Folder for results.json, results.md, comparison.png, and `seed-<seed>/<run>` of every run.
        equal_time: Also train the target alone for 1.1 times the time of the guided run, on average over the seeds.
        metric: Metric of the evaluation, without `eval_`.
        percent: Whether it is a fraction, whose gain is in points; else the gain is in percent.
        higher_is_better: Whether a higher value is better; by default so for all but the loss.
        test_dataset: Rows that runs are compared by, after training. None takes the last evaluation on `eval_dataset`,
            which is fair if these rows chose no setting.

    Returns:
        Records, table and paired gains, written to the folder too.

    Raises:
        ValueError: If a seed or control is wrong, a trainer does not follow its run or differs in more than guidance,
            or the folder holds other runs. Each trainer is made once before any training to find this out.

    Example:
        >>> def make_trainer(run):  # doctest: +SKIP
        ...     args = TrainingArguments(run.output_dir, seed=run.seed, max_steps=run.max_steps or 500)
        ...     own = {"guide": load_guide("gpt2") if run.guided else None, "guidance": run.guidance(config)}
        ...     return GuidanceTrainer(Target(), args, train_dataset=rows, eval_dataset=others, **own)
        >>> print(compare_runs(make_trainer, seeds=[0, 1, 2]))  # doctest: +SKIP
    """
    place = Path(folder)
    seeds = checked_seeds(seeds)
    _check(make_trainer, controls, place, len(seeds), metric)
    if test_dataset is not None:
        check_rows(test_dataset, "test_dataset")
    rehearse(make_trainer, _runs(seeds[0], controls, place, equal_time), metric)
    higher = metric != "loss" if higher_is_better is None else higher_is_better
    data = "validation" if test_dataset is None else "test"
    task = {"metric": metric, "percent": percent, "higher_is_better": higher, "data": data}
    carry_out = partial(_carry_out, make_trainer=make_trainer, metric=metric, test_dataset=test_dataset)
    results: list[Record] = []
    for seed in seeds:
        results += [carry_out(run) for run in _runs(seed, controls, place)]
    for seed in seeds if equal_time else ():
        longer = longer_run(Run(ALONE, seed, _no_network), results[0]["steps"], results, GUIDED)
        steps = longer.training["max_steps"]
        run = MatchedRun(EQUAL_TIME, seed, False, str(place / f"seed-{seed}" / longer.name), max_steps=steps)
        results.append(carry_out(run))
    _check_positive(results, metric, percent)
    found = MatchedRuns(task, results)
    found.save(place)
    return found


def _runs(seed: int, controls: Sequence[str], place: Path, longer: bool = False) -> list[MatchedRun]:
    """Return the runs of a seed: alone, guided and controls, and one that stands for the longer run, if it is asked."""
    runs = [
        MatchedRun(
            name, seed, name != ALONE, str(place / f"seed-{seed}" / name), control=name if name in CONTROLS else None
        )
        for name in (ALONE, GUIDED, *controls)
    ]
    example = MatchedRun(EQUAL_TIME, seed, False, str(place / f"seed-{seed}" / EQUAL_TIME), max_steps=1)
    return [*runs, example] if longer else runs


def _check(make_trainer: MakeTrainer, controls: Sequence[str], folder: Path, seeds: int, metric: str) -> None:
    if not callable(make_trainer):
        raise ValueError(f"make_trainer is a {type(make_trainer).__name__}; expected a function of a run.")
    if metric.startswith("eval_"):
        raise ValueError(f"metric is {metric!r}; expected its name without eval_: {metric.removeprefix('eval_')!r}.")
    if isinstance(controls, str):
        raise ValueError(f"controls is the string {controls!r}; expected a list of names.")
    if wrong := [name for name in controls if name not in CONTROLS]:
        raise ValueError(f"controls name {wrong[0]!r}; possible are {', '.join(CONTROLS)}.")
    if len(set(controls)) < len(controls):
        raise ValueError(f"controls are {list(controls)}; name each once.")
    needed = ["matplotlib", *(["scipy"] if seeds > 1 else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f"compare_runs needs {' and '.join(missing)}: pip install 'hf_guidance[recipes]'.")
    check_writable(folder, "folder")


def _no_network() -> Any:
    raise AssertionError("the network of this run is built by its trainer")


def _carry_out(run: MatchedRun, make_trainer: MakeTrainer, metric: str, test_dataset: Any) -> Record:
    """Train a run, or read its record if it is finished."""
    set_seed(run.seed)
    trainer: Any = make_trainer(run)
    check_follows(trainer, run)
    if not any(isinstance(callback, TrainingClock) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(TrainingClock())
    named = Run(run.name, run.seed, lambda: trainer.model, (lambda: trainer.guide) if run.guided else None)
    data: dict[str, Any] = {"rows": _count(trainer.train_dataset), "eval_rows": _count(trainer.eval_dataset)}
    data |= {} if test_dataset is None else {"test_rows": _count(test_dataset)}
    guidance = trainer.guidance if run.guided else None
    place = Path(run.output_dir)
    settings = settings_of(trainer.model, trainer.args, guidance, data)
    try:
        record = result_of(named, place, settings)
    except ValueError as error:
        raise ValueError(str(error).replace("another output_dir", "another folder")) from error
    if record is None:
        record = train_and_record(
            named, trainer, place, settings, metric, partial(_tested, metric=metric, rows=test_dataset)
        )
    trainer.accelerator.wait_for_everyone()
    return record


def _count(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None


def _tested(trainer: Trainer, metric: str, rows: Any) -> dict[str, float]:
    """Return the metrics on test data or, without such, those of the last evaluation, with the prefix `test_`."""
    if rows is not None:
        trainer.evaluate(rows, metric_key_prefix="test")
    split = "eval" if rows is None else "test"
    last = next(log for log in reversed(trainer.state.log_history) if f"{split}_loss" in log)
    found = metrics_of(last, split)
    if metric not in found:
        raise ValueError(f"metric is {metric!r}, but the evaluation gives {', '.join(found)}: name one of these.")
    return {f"test_{name}": value for name, value in found.items()}


def _check_positive(results: Sequence[Record], metric: str, percent: bool) -> None:
    values = [run["test"][metric] for run in results]
    if not percent and min(values) <= 0:
        raise ValueError(
            f"{metric} is {min(values):g} in a run, and a gain in percent needs values above 0: for a fraction pass "
            "percent=True. The runs are kept, so that calling again is quick."
        )
