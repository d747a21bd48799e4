"""The main function of the recipes: flags, presets, learning rate of the baseline, matched runs, table and figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments

from hf_guidance.analysis.curves import plot_comparison
from hf_guidance.analysis.heat_maps import plot_similarity_maps
from hf_guidance.card.facts import EXAMPLES, task_facts
from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.cards import LICENSE, push_runs, write_cards
from hf_guidance.experiments.command_line import check_choice, parse
from hf_guidance.experiments.comparison import RESULT, best_learning_rate, carry_out, check
from hf_guidance.experiments.files import write_json
from hf_guidance.experiments.report import Record, Report, comparison_rows, markdown_table
from hf_guidance.experiments.run import SETTINGS, Run
from hf_guidance.experiments.user_errors import tell_in_one_line
from hf_guidance.tasks import Task
from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.checks import check_machine, check_writable
from hf_guidance.trainer.environment import environment, usable_cpus
from hf_guidance.trainer.run_facts import command_facts

PRESETS = ("small", "paper")
LONGER = "alone_longer"
REFUSED = {"--seed", "--num_train_epochs", "--resume_from_checkpoint"}
INSTEAD = "use --seeds and --max_steps instead; rerun the same command to resume"


@dataclass
class RecipeArguments:
    """The flags that all recipes share; each recipe adds its own."""

    preset: str = field(
        default="small",
        metadata={"help": "small (for two CPU cores) or paper (the sizes of the paper, for a GPU)."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One set of matched runs per seed."})
    runs: Optional[list[str]] = field(default=None, metadata={"help": "Names of the matched runs to train; see above."})
    learning_rates: Optional[list[float]] = field(
        default=None,
        metadata={"help": "Train the target alone at each of these; all runs use the best on validation data."},
    )
    longer_baseline: bool = field(
        default=False,
        metadata={"help": "Also train the target alone for longer: twice the steps, and equal training time."},
    )
    eval_size: Optional[int] = field(default=None, metadata={"help": "Rows for validation, and rows for the test."})
    guide_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate for training the guide itself."}
    )
    guide_max_steps: Optional[int] = field(default=None, metadata={"help": "Steps for training the guide itself."})

    def guide_training(self) -> dict[str, Any]:
        """Return the `TrainingArguments` fields that were given for the guide's own training."""
        own = {"learning_rate": self.guide_learning_rate, "max_steps": self.guide_max_steps}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """The data and runs of a recipe, once its flags are known.

    Args:
        task: The data, with collator and metrics.
        data: Description of the data for the results, as JSON values.
        target: Builds the network that all runs train.
        runs: Returns the matched runs of a seed, each after the runs that it needs.
        train_dataset: Returns the training rows of a seed, if order or augmentation depend on it; None uses the task's.
        summary: Returns text to print below the table, or an empty string; called on every process.
    """

    task: Task
    data: dict[str, Any]
    target: Callable[[], PreTrainedModel]
    runs: Callable[[int], list[Run]]
    train_dataset: Callable[[int], Any] | None = None
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
    build: Callable[[A, TrainingArguments], Comparison],
) -> None:
    """Run a recipe from its command line.

    Args:
        description: Text for `--help`.
        arguments: Dataclass of the recipe's own flags.
        defaults: Maps the flags to defaults of `TrainingArguments` and `GuidanceConfig` fields, `output_dir` included.
        build: Maps the flags and the training arguments to the comparison.
    """
    tell_in_one_line()
    recipe, args, guidance = _parse(description, arguments, defaults)
    check_machine(args)
    if args.device.type == "cpu":  # a bare `accelerate launch` leaves one thread
        torch.set_num_threads(max(1, usable_cpus() // args.world_size))
    folder = Path(str(args.output_dir))
    check_writable(folder, "--output_dir")
    try:
        comparison = build(recipe, args)
        report = compare(recipe, args, guidance, comparison)
    except KeyboardInterrupt:
        if PartialState().is_main_process:
            print(f"\nStopped. Results so far are in {folder}. Rerun the same command to resume.", file=sys.stderr)
        sys.exit(130)
    except ConnectionError as error:  # no Hub, or reading a stream failed, after its retries
        said = (str(error).splitlines() or [""])[-1]  # a worker's error begins with its traceback
        raise ConnectionError(f"{said}{_resuming(folder)}") from error
    summary = comparison.summary()
    not_pushed = None
    if PartialState().is_main_process:
        try:
            publish(report, folder, args)
        except ConnectionError as error:
            not_pushed = error
        print(summary, end="")
    PartialState().wait_for_everyone()  # a rank that exits early would break the others
    PartialState().destroy_process_group()
    if not_pushed is not None:
        raise not_pushed


def _resuming(folder: Path) -> str:
    """Tell how to resume the runs in a folder that have begun; empty if none has."""
    begun = [path.parent for path in folder.glob(f"seed-*/*/{SETTINGS}") if not (path.parent / RESULT).is_file()]
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
    recipe: RecipeArguments, args: TrainingArguments, guidance: GuidanceConfig, comparison: Comparison
) -> Report:
    """Train every run; read the results of finished runs, and resume interrupted ones."""
    task, folder = comparison.task, Path(str(args.output_dir))
    alone = [Run("alone", seed, comparison.target) for seed in recipe.seeds]
    if recipe.longer_baseline and "alone" not in {run.name for run in comparison.runs(recipe.seeds[0])}:
        raise ValueError(
            "--longer_baseline trains the run 'alone' for longer, but --runs does not name it: add alone to --runs."
        )
    name = Path(sys.argv[0]).name
    command = ["accelerate", "launch", f"recipes/{name}", *sys.argv[1:]]
    started = command_facts(command, type(recipe), TrainingArguments, GuidanceConfig)
    facts: Any = started | {"license": LICENSE}
    facts |= {"data": task_facts(task.name, task.description, comparison.data), "example": EXAMPLES.get(task.name)}
    for run in comparison.runs(recipe.seeds[0]):
        check(run, task, args, guidance, folder)

    def carry(run: Run) -> Record:
        own = replace(task, train_dataset=comparison.train_dataset(run.seed)) if comparison.train_dataset else task
        return carry_out(run, own, args, guidance, folder, comparison.data, facts)

    search: list[Record] = []
    if recipe.learning_rates:
        args.learning_rate, search = best_learning_rate(alone, recipe.learning_rates, carry, task.higher_is_better)
    found = {r["seed"]: r | {"run": "alone"} for r in search if r["settings"]["learning_rate"] == args.learning_rate}
    results = [
        found[seed] if found and run.name == "alone" else carry(run)
        for seed in recipe.seeds
        for run in comparison.runs(seed)
    ]
    if recipe.longer_baseline:
        results += [carry(_longer(run, args.max_steps, results)) | {"run": LONGER} for run in alone]
    made: Any = {
        "recipe": Path(name).stem,
        **started,
        "environment": environment(),
        "task": {
            "name": task.name,
            "description": task.description,
            "metric": task.metric,
            "percent": task.percent,
        },
        "learning_rate_search": [{k: r[k] for k in ("run", "seed", "validation")} for r in search],
        "runs": results,
    }
    return made


def _longer(run: Run, steps: int, results: list[Record]) -> Run:
    """Return the unguided run, trained for twice the steps or 1.25 times the time of the slowest guided run of its
    seed.

    It takes whichever is longer.
    """
    own = [r for r in results if r["seed"] == run.seed]
    guided = max((r["seconds"] for r in own if r["guide"]), default=0.0)
    times = guided / next(r["seconds"] for r in own if r["run"] == "alone")
    more = int(steps * max(2.0, 1.25 * times) + 1)
    return replace(run, name=f"{LONGER}-{more}", training={"max_steps": more})


def publish(report: Report, folder: Path, args: TrainingArguments) -> None:
    """Write table, results.json, figures and cards, the numbers first: a later failure must not lose them."""
    metric, percent = report["task"]["metric"], report["task"]["percent"]
    report["table"] = comparison_rows(report["runs"], metric=metric)
    write_json(folder / "results.json", report)
    print("\n" + markdown_table(report["table"], metric, percent) + "\n")
    plot_comparison(report["runs"], metric, folder / "comparison.png", percent=percent, log=not percent)
    written = [f"{folder}/results.json", f"{folder}/comparison.png"]
    if plot_similarity_maps(report["runs"], folder / "similarity.png"):
        written.append(f"{folder}/similarity.png")
    cards = write_cards(report, folder)
    print(", ".join([*written, *(f"{place}/README.md" for place in cards)]))
    if args.push_to_hub:
        push_runs(report, cards, args.hub_token, args.hub_revision)
