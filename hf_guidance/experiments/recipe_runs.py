"""The runs of a recipe: checked, trained or read one after another, and gathered in a report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_guidance.card.facts import EXAMPLES, task_facts
from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.baselines import LONGER, best_learning_rate, equal_time, longer, say_edge
from hf_guidance.experiments.cards import LICENSE
from hf_guidance.experiments.comparison import carry_out, check, check_folder, run_folder
from hf_guidance.experiments.progress import Progress
from hf_guidance.experiments.report import Record, Report, versions_of
from hf_guidance.experiments.run import Run, first_rows
from hf_guidance.experiments.verdicts import EQUAL_TIME, gains
from hf_guidance.experiments.watching import WatchedDimensions
from hf_guidance.tasks import Task
from hf_guidance.trainer.environment import environment
from hf_guidance.trainer.similarity_film import SimilarityFilm

FEWEST = 3  # rows, of which an intrinsic dimension is measured


@dataclass(frozen=True)
class Setup:
    """The data and runs of a recipe, once its flags are known.

    Args:
        task: The data, with collator and metrics.
        data: Description of the data for the results, as JSON values.
        target: Builds the network that all runs train.
        runs: Returns the matched runs of a seed, each after the runs that it needs.
        train_dataset: Returns the training rows of a seed, if order or augmentation depend on it; None uses the task's.
        callbacks: Returns callbacks for the trainer of a run, given its task.
        leaves_out: Whether runs whose networks or settings do not fit together are left out and said; else they are an
            error.
        summary: Returns text to print below the table, or an empty string; called on every process.
    """

    task: Task
    data: dict[str, Any]
    target: Callable[[], PreTrainedModel]
    runs: Callable[[int], list[Run]]
    train_dataset: Callable[[int], Any] | None = None
    callbacks: Callable[[Task], list[TrainerCallback]] = lambda task: []
    leaves_out: bool = False
    summary: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class CrossedSetups:
    """Setups of several targets, each guided by the same guides.

    Args:
        setups: Name of a target, and of its folder → its setup.
        guides: Name of a run → name of its guide.
    """

    setups: dict[str, Setup]
    guides: dict[str, str]


def check_seeds(recipe: RecipeArguments) -> None:
    """Raise ValueError if a seed chooses the learning rate and reports too."""
    if recipe.learning_rates and (both := set(recipe.seeds) & set(recipe.search_seeds)):
        raise ValueError(
            f"--seeds and --search_seeds both name {', '.join(map(str, sorted(both)))}: a seed that chose the learning "
            "rate cannot report what it is worth. Choose others."
        )


def check_plan(recipe: RecipeArguments, args: TrainingArguments, guidance: GuidanceConfig, setup: Setup) -> None:
    """Raise ValueError if flags do not go with the runs, or the output folder holds runs with other settings."""
    named = {run.name for run in setup.runs(recipe.seeds[0])}
    if (recipe.longer_baseline or recipe.equal_time_baseline) and "alone" not in named:
        raise ValueError(
            "--longer_baseline and --equal_time_baseline train the run 'alone' for longer, but --runs does not name "
            "it: add alone to --runs."
        )
    guided = sorted(run.name for run in setup.runs(recipe.seeds[0]) if run.guide is not None)
    if recipe.equal_time_to is not None and recipe.equal_time_to not in guided:
        raise ValueError(
            f"--equal_time_to {recipe.equal_time_to} is none of the guided runs ({', '.join(guided) or 'none'})."
        )
    if recipe.equal_time_to is not None and not recipe.equal_time_baseline:
        raise ValueError(
            "--equal_time_to chooses the run that --equal_time_baseline goes by: add --equal_time_baseline."
        )
    if recipe.equal_time_baseline and not guided:
        raise ValueError("--equal_time_baseline needs a guided run, whose time it takes: add one to --runs.")
    if recipe.dimension_rows is not None and recipe.dimension_rows < FEWEST:
        raise ValueError(f"--dimension_rows is {recipe.dimension_rows}; a dimension needs at least {FEWEST} rows.")
    if recipe.film_steps is not None and recipe.film_steps < 1:
        raise ValueError(f"--film_steps is {recipe.film_steps}; a film needs a map every 1 or more steps.")
    for run in (run for seed in recipe.seeds for run in setup.runs(seed)):
        check_folder(run, args, guidance, Path(str(args.output_dir)), setup.data, searched=bool(recipe.learning_rates))


def _left_out(
    recipe: RecipeArguments, args: TrainingArguments, guidance: GuidanceConfig, setup: Setup
) -> dict[str, str]:
    """Return the runs that are left out, as their networks or settings do not fit together, each with the reason."""
    found = {}
    for run in setup.runs(recipe.seeds[0]):
        try:
            check(run, setup.task, args, guidance, Path(str(args.output_dir)))
        except ValueError as error:
            if not setup.leaves_out:
                raise
            found[run.name] = str(error)
    return found


def compare(
    recipe: RecipeArguments,
    args: TrainingArguments,
    guidance: GuidanceConfig,
    setup: Setup,
    started: Mapping[str, Json],
    progress: Progress,
) -> Report:
    """Train every run; read the results of finished runs, and resume interrupted ones.

    Args:
        recipe: Flags of the recipe.
        args: Training arguments that all runs share.
        guidance: Guidance settings that all runs share.
        setup: Data and runs.
        started: Result of `command_facts`.
        progress: Is told which runs are done.
    """
    task, folder = setup.task, Path(str(args.output_dir))
    facts: Any = {**started, "license": LICENSE}
    facts |= {"data": task_facts(task.name, task.description, setup.data), "example": EXAMPLES.get(task.name)}
    left_out = _left_out(recipe, args, guidance, setup)
    for name, reason in left_out.items():
        progress.leave_out(folder, name)
        if PartialState().is_main_process:
            print(f"{name} is left out: {reason}", flush=True)

    def carry(run: Run) -> Record:
        own = replace(task, train_dataset=setup.train_dataset(run.seed)) if setup.train_dataset else task
        with progress.running(run_folder(run, folder)):
            return carry_out(run, own, args, guidance, folder, setup.data, facts, partial(callbacks, run))

    def callbacks(run: Run, own: Task) -> list[TrainerCallback]:
        found = setup.callbacks(own)
        if recipe.film_steps is not None and run.guide is not None:
            found.append(SimilarityFilm(recipe.film_steps, batch=first_rows(own, args.per_device_train_batch_size)))
        if recipe.dimension_rows is not None:
            found.append(WatchedDimensions(first_rows(own, recipe.dimension_rows)))
        return found

    results, search = _trained(recipe, args, setup, carry, left_out)
    return _report(recipe, task, started, results, search)


def _trained(
    recipe: RecipeArguments,
    args: TrainingArguments,
    setup: Setup,
    carry: Callable[[Run], Record],
    left_out: Collection[str],
) -> tuple[list[Record], list[Record]]:
    """Return the records of all runs, and of those that chose the learning rate, which `args` gets."""
    alone = [Run("alone", seed, setup.target) for seed in recipe.seeds]
    search: list[Record] = []
    if recipe.learning_rates:
        trying = [replace(run, seed=seed) for seed in recipe.search_seeds for run in alone[:1]]
        higher = setup.task.higher_is_better
        args.learning_rate, search = best_learning_rate(trying, recipe.learning_rates, carry, higher)
        say_edge(args.learning_rate, recipe.learning_rates)
    results = [carry(run) for seed in recipe.seeds for run in setup.runs(seed) if run.name not in left_out]
    if recipe.equal_time_baseline:
        results += [
            carry(equal_time(run, args.max_steps, results, recipe.equal_time_to)) | {"run": EQUAL_TIME} for run in alone
        ]
    if recipe.longer_baseline:
        results += [carry(longer(run, args.max_steps, results)) | {"run": LONGER} for run in alone]
    return results, search


def _report(
    recipe: RecipeArguments, task: Task, started: Mapping[str, Any], results: list[Record], search: list[Record]
) -> Report:
    made: Any = {
        "recipe": Path(sys.argv[0]).stem,
        **started,
        "environment": environment(),
        "versions": versions_of(results),
        "task": {
            "name": task.name,
            "description": task.description,
            "metric": task.metric,
            "percent": task.percent,
            "higher_is_better": task.higher_is_better,
            "chance": task.chance,
        },
        "learning_rate_search": [{k: r[k] for k in ("run", "seed", "validation")} for r in search],
        "runs": results,
    }
    if recipe.claim:
        made["claim"] = recipe.claim
    made["differences"] = gains(results, made["task"])
    return made
