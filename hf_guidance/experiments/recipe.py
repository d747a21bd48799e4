"""The main function of the recipes: flags, presets, learning rate of the baseline, matched runs, table and figures."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_guidance.analysis.curves import plot_comparison
from hf_guidance.analysis.heat_maps import plot_similarity_maps
from hf_guidance.card.facts import EXAMPLES, task_facts
from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.baselines import LONGER, equal_time, longer, say_edge
from hf_guidance.experiments.cards import LICENSE, push_runs, write_cards
from hf_guidance.experiments.command_line import check_choice, parse, with_flags_of_the_claim, with_flags_of_the_file
from hf_guidance.experiments.comparison import best_learning_rate, carry_out, check
from hf_guidance.experiments.consistency import plot_errors
from hf_guidance.experiments.files import write_json
from hf_guidance.experiments.matrix import Cells, cells_of, matrix_table, plot_gains
from hf_guidance.experiments.report import Record, Report, comparison_rows, markdown_table
from hf_guidance.experiments.run import SETTINGS, Run, first_rows
from hf_guidance.experiments.run_training import RESULT
from hf_guidance.experiments.sweeps import settings_of_sweeps, swept, take_sweeps
from hf_guidance.experiments.user_errors import tell_in_one_line
from hf_guidance.experiments.verdicts import EQUAL_TIME, gains, in_words
from hf_guidance.experiments.watching import WatchedDimensions, plot_dimensions, plot_films
from hf_guidance.tasks import Task
from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.checks import check_machine, check_writable
from hf_guidance.trainer.environment import environment, usable_cpus
from hf_guidance.trainer.run_facts import command_facts
from hf_guidance.trainer.similarity_film import SimilarityFilm

PRESETS = ("small", "paper")
FEWEST = 3  # rows, of which an intrinsic dimension is measured
REFUSED = {"--seed", "--num_train_epochs", "--resume_from_checkpoint"}
INSTEAD = "use --seeds and --max_steps instead; rerun the same command to resume"


@dataclass(frozen=True)
class Matrix:
    """Comparisons of several targets, each guided by the same guides.

    Args:
        comparisons: Name of a target, and of its folder → its comparison.
        guides: Name of a run → name of its guide.
    """

    comparisons: dict[str, Comparison]
    guides: dict[str, str]


@dataclass(frozen=True)
class Comparison:
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


A = TypeVar("A", bound=RecipeArguments)


def training_defaults(steps: int, batch: int, rate: float) -> dict[str, Any]:
    """Return the `TrainingArguments` of a preset: 20 validations and 40 logs per run, constant learning rate.

    Args:
        steps: Optimizer steps.
        batch: Rows in a batch of one process.
        rate: Learning rate.
    """
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 2 * batch,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",  # so a longer run passes through the states of a shorter one
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 40),
        "save_steps": max(1, steps // 4),
        "save_total_limit": 1,
        "report_to": ["none"],
        "ddp_find_unused_parameters": False,
        "use_cpu": not torch.accelerator.is_available(),  # else CPU processes would not form a group
    }


def launch(
    description: str,
    arguments: type[A],
    defaults: Callable[[A], dict[str, Any]],
    build: Callable[[A, TrainingArguments], Comparison | Matrix],
    claims: Mapping[str, str] | None = None,
) -> None:
    """Run a recipe from its command line.

    Args:
        description: Text for `--help`.
        arguments: Dataclass of the recipe's own flags.
        defaults: Maps the flags to defaults of `TrainingArguments` and `GuidanceConfig` fields, `output_dir` included.
        build: Maps the flags and the training arguments to the comparison, or to several.
        claims: Name of a claim, for `--claim` → the flags of its comparison.
    """
    tell_in_one_line()
    sys.argv[1:] = with_flags_of_the_file(sys.argv[1:])
    command = ["accelerate", "launch", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    sys.argv[1:] = with_flags_of_the_claim(sys.argv[1:], claims or {})
    sweeps = take_sweeps(sys.argv)
    recipe, args, guidance = _parse(description, arguments, defaults)
    settings = settings_of_sweeps(sweeps, guidance)
    check_machine(args)
    if args.device.type == "cpu":  # a bare `accelerate launch` leaves one thread
        torch.set_num_threads(max(1, usable_cpus() // args.world_size))
    folder = Path(str(args.output_dir))
    check_writable(folder, "--output_dir")
    reports: dict[str, Report] = {}
    not_pushed = None
    try:
        built = build(recipe, args)
        comparisons = built.comparisons if isinstance(built, Matrix) else {"": built}
        if isinstance(built, Matrix) and sweeps:
            raise ValueError(f"--{next(iter(sweeps))}: this recipe crosses targets with guides; give one value.")
        for name, comparison in comparisons.items():
            own = _in_folder(args, name)
            comparison = replace(comparison, runs=swept(comparison.runs, settings))
            reports[name] = compare(recipe, own, guidance, comparison, command)
            summary = comparison.summary()
            if PartialState().is_main_process:
                try:
                    publish(reports[name], folder / name, own)
                except ConnectionError as error:
                    not_pushed = error
                print(summary, end="")
    except KeyboardInterrupt:
        if PartialState().is_main_process:
            print(f"\nStopped. Results so far are in {folder}. Rerun the same command to resume.", file=sys.stderr)
        sys.exit(130)
    except ConnectionError as error:  # no Hub, or reading a stream failed, after its retries
        said = (str(error).splitlines() or [""])[-1]  # a worker's error begins with its traceback
        raise ConnectionError(f"{said}{_resuming(folder)}") from error
    if isinstance(built, Matrix) and PartialState().is_main_process:
        publish_matrix(cells_of(reports, built.guides), folder)
    PartialState().wait_for_everyone()  # a rank that exits early would break the others
    PartialState().destroy_process_group()
    if not_pushed is not None:
        raise not_pushed


def _in_folder(args: TrainingArguments, name: str) -> TrainingArguments:
    """Return training arguments for one of several comparisons, which has a folder of its own."""
    own = copy.copy(args)
    if name:
        own.output_dir = str(Path(str(args.output_dir)) / name)
        own.hub_model_id = args.hub_model_id and f"{args.hub_model_id}-{name.replace('_', '-')}"
    return own


def _resuming(folder: Path) -> str:
    """Tell how to resume the runs in a folder that have begun; empty if none has."""
    begun = [path.parent for path in folder.glob(f"**/seed-*/*/{SETTINGS}") if not (path.parent / RESULT).is_file()]
    if not begun:
        return ""
    kept = [Path(last).name for place in begun if (last := last_complete_checkpoint(place))]
    return f" Rerun the same command to resume from {kept[-1] if kept else 'the start of that run'}; see {folder}."


def _parse(
    description: str, arguments: type[A], defaults: Callable[[A], dict[str, Any]]
) -> tuple[A, TrainingArguments, GuidanceConfig]:
    def checked(recipe: A) -> dict[str, Any]:
        check_choice("preset", recipe.preset, PRESETS)
        return defaults(recipe)

    parsed = parse(description, arguments, checked, refused=REFUSED, instead=INSTEAD)
    if parsed[1].eval_strategy == "no" or parsed[0].eval_size == 0:
        raise ValueError(
            "--eval_strategy no, --eval_size 0: runs are compared by their validation values. Leave validation on."
        )
    if parsed[1].max_steps < 1:
        raise ValueError(
            f"--max_steps is {parsed[1].max_steps}; it must be at least 1: matched runs are compared step by step, and "
            "a stream has no end."
        )
    return parsed


def compare(
    recipe: RecipeArguments,
    args: TrainingArguments,
    guidance: GuidanceConfig,
    comparison: Comparison,
    command: list[str],
) -> Report:
    """Train every run; read the results of finished runs, and resume interrupted ones."""
    task, folder = comparison.task, Path(str(args.output_dir))
    alone = [Run("alone", seed, comparison.target) for seed in recipe.seeds]
    named = {run.name for run in comparison.runs(recipe.seeds[0])}
    if (recipe.longer_baseline or recipe.equal_time_baseline) and "alone" not in named:
        raise ValueError(
            "--longer_baseline and --equal_time_baseline train the run 'alone' for longer, but --runs does not name "
            "it: add alone to --runs."
        )
    if recipe.equal_time_to is not None and recipe.equal_time_to not in named:
        raise ValueError(f"--equal_time_to {recipe.equal_time_to} is none of the runs: {', '.join(sorted(named))}.")
    if recipe.dimension_rows is not None and recipe.dimension_rows < FEWEST:
        raise ValueError(f"--dimension_rows is {recipe.dimension_rows}; a dimension needs at least {FEWEST} rows.")
    if recipe.film_steps is not None and recipe.film_steps < 1:
        raise ValueError(f"--film_steps is {recipe.film_steps}; a film needs a map every 1 or more steps.")
    if recipe.learning_rates and (both := set(recipe.seeds) & set(recipe.search_seeds)):
        raise ValueError(
            f"--seeds and --search_seeds both name {', '.join(map(str, sorted(both)))}: a seed that chose the learning "
            "rate cannot report what it is worth. Choose others."
        )
    started = command_facts(command, type(recipe), TrainingArguments, GuidanceConfig)
    facts: Any = started | {"license": LICENSE}
    facts |= {"data": task_facts(task.name, task.description, comparison.data), "example": EXAMPLES.get(task.name)}
    left_out = set()
    for run in comparison.runs(recipe.seeds[0]):
        try:
            check(run, task, args, guidance, folder)
        except ValueError as error:
            if not comparison.leaves_out:
                raise
            left_out.add(run.name)
            if PartialState().is_main_process:
                print(f"{run.name} is left out: {error}", flush=True)

    def carry(run: Run) -> Record:
        own = replace(task, train_dataset=comparison.train_dataset(run.seed)) if comparison.train_dataset else task
        return carry_out(run, own, args, guidance, folder, comparison.data, facts, partial(callbacks, run))

    def callbacks(run: Run, own: Task) -> list[TrainerCallback]:
        found = comparison.callbacks(own)
        if recipe.film_steps is not None and run.guide is not None:
            found.append(SimilarityFilm(recipe.film_steps, batch=first_rows(own, args.per_device_train_batch_size)))
        if recipe.dimension_rows is not None:
            found.append(WatchedDimensions(first_rows(own, recipe.dimension_rows)))
        return found

    search: list[Record] = []
    if recipe.learning_rates:
        trying = [replace(run, seed=seed) for seed in recipe.search_seeds for run in alone[:1]]
        args.learning_rate, search = best_learning_rate(trying, recipe.learning_rates, carry, task.higher_is_better)
        say_edge(args.learning_rate, recipe.learning_rates)
    results = [carry(run) for seed in recipe.seeds for run in comparison.runs(seed) if run.name not in left_out]
    if recipe.equal_time_baseline:
        results += [
            carry(equal_time(run, args.max_steps, results, recipe.equal_time_to)) | {"run": EQUAL_TIME} for run in alone
        ]
    if recipe.longer_baseline:
        results += [carry(longer(run, args.max_steps, results)) | {"run": LONGER} for run in alone]
    made: Any = {
        "recipe": Path(sys.argv[0]).stem,
        **started,
        "environment": environment(),
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


def publish(report: Report, folder: Path, args: TrainingArguments) -> None:
    """Write table, results.json, figures and cards, the numbers first: a later failure must not lose them."""
    metric, percent = report["task"]["metric"], report["task"]["percent"]
    report["table"] = comparison_rows(report["runs"], metric=metric)
    write_json(folder / "results.json", report)
    print("\n" + markdown_table(report["table"], metric, percent) + "\n")
    for found in report["differences"]:
        print(in_words(found))
    plot_comparison(
        report["runs"],
        metric,
        folder / "comparison.png",
        percent=percent,
        log=not percent,
        chance=report["task"].get("chance"),
    )
    written = [f"{folder}/results.json", f"{folder}/comparison.png"]
    if plot_similarity_maps(report["runs"], folder / "similarity.png"):
        written.append(f"{folder}/similarity.png")
    if plot_dimensions(report["runs"], folder / "dimensions.png"):
        written.append(f"{folder}/dimensions.png")
    if plot_errors(report["runs"], folder, folder / "errors.png"):
        written.append(f"{folder}/errors.png")
    written += plot_films(report["runs"], folder)
    cards = write_cards(report, folder)
    print(", ".join([*written, *(f"{place}/README.md" for place in cards)]))
    if args.push_to_hub:
        push_runs(report, cards, args.hub_token, args.hub_revision)


def publish_matrix(cells: Cells, folder: Path) -> None:
    """Write the gains of several targets as matrix.json, print them as a table, and draw them."""
    write_json(folder / "matrix.json", cells)
    print("\n" + matrix_table(cells) + "\n")
    plot_gains(cells, folder / "matrix.png")
    print(f"{folder}/matrix.json, {folder}/matrix.png")
