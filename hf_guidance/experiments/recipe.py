"""The main function of the recipes: flags, presets, the plan of their runs, and what is published of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.command_line import (
    check_choice,
    names_of,
    parse,
    value_of,
    with_flags_of_the_claim,
    with_flags_of_the_file,
)
from hf_guidance.experiments.matrix import cells_of
from hf_guidance.experiments.progress import Progress, in_lines, planned_runs
from hf_guidance.experiments.publishing import publish, publish_matrix
from hf_guidance.experiments.recipe_runs import CrossedSetups, Setup, check_plan, check_seeds, compare
from hf_guidance.experiments.report import Report
from hf_guidance.experiments.run import SETTINGS
from hf_guidance.experiments.run_training import RESULT
from hf_guidance.experiments.sweeps import check_given, settings_of_sweeps, swept, take_sweeps, with_lists
from hf_guidance.experiments.user_errors import tell_in_one_line
from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.checks import check_machine, check_writable
from hf_guidance.trainer.environment import usable_cpus
from hf_guidance.trainer.run_facts import command_facts

PRESETS = ("small", "paper")
REFUSED = {"--seed", "--num_train_epochs", "--resume_from_checkpoint"}
INSTEAD = "use --seeds and --max_steps instead; rerun the same command to resume"

A = TypeVar("A", bound=RecipeArguments)
Plan: TypeAlias = dict[str, tuple[Setup, TrainingArguments]]  # name of a target, or "" → its own


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
    build: Callable[[A, TrainingArguments], Setup | CrossedSetups],
    claims: Mapping[str, str] | None = None,
) -> None:
    """Run a recipe from its command line.

    Args:
        description: Text for `--help`.
        arguments: Dataclass of the recipe's own flags.
        defaults: Maps the flags to defaults of `TrainingArguments` and `GuidanceConfig` fields, `output_dir` included.
        build: Maps the flags and the training arguments to the setup, or to several.
        claims: Name of a claim, for `--claim` → its flags.
    """
    tell_in_one_line()
    file = value_of(sys.argv[1:], "--config")
    sys.argv[1:] = with_flags_of_the_file(sys.argv[1:])
    command = ["accelerate", "launch", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    given = names_of(sys.argv[1:])
    sys.argv[1:] = with_flags_of_the_claim(sys.argv[1:], claims or {})
    sweeps = take_sweeps(sys.argv)
    recipe, args, guidance = _parse(description, arguments, defaults, file)
    settings = settings_of_sweeps(sweeps, guidance)
    check_machine(args)
    check_seeds(recipe)
    if args.device.type == "cpu":  # a bare `accelerate launch` leaves one thread
        torch.set_num_threads(max(1, usable_cpus() // args.world_size))
    folder = Path(str(args.output_dir))
    check_writable(folder, "--output_dir")
    try:
        built = build(recipe, args)
        plan = _plan(built, args, settings)
        for setup in built.setups.values() if isinstance(built, CrossedSetups) else [built]:
            check_given(given, sweeps, guidance, setup.runs(recipe.seeds[0]))
        started = command_facts(command, type(recipe), TrainingArguments, with_lists(settings))
        reports, not_pushed = _carry_out(recipe, guidance, plan, folder, started)
    except KeyboardInterrupt:
        if PartialState().is_main_process:
            print(f"\nStopped. Results so far are in {folder}. Rerun the same command to resume.", file=sys.stderr)
        sys.exit(130)
    except ConnectionError as error:  # no Hub, or reading a stream failed, after its retries
        said = (str(error).splitlines() or [""])[-1]  # a worker's error begins with its traceback
        raise ConnectionError(f"{said}{_resuming(folder)}") from error
    if isinstance(built, CrossedSetups) and PartialState().is_main_process:
        publish_matrix(cells_of(reports, built.guides), folder)
    PartialState().wait_for_everyone()  # a rank that exits early would break the others
    PartialState().destroy_process_group()
    if not_pushed is not None:
        raise not_pushed


def _plan(built: Setup | CrossedSetups, args: TrainingArguments, settings: dict[str, dict[str, Any]]) -> Plan:
    """Return the setups, with a run at each of the settings that are swept."""
    if isinstance(built, CrossedSetups) and settings:
        swept_flag = next(iter(next(iter(settings.values()))))
        raise ValueError(f"--{swept_flag}: this recipe crosses targets with guides; give one value.")
    return {
        name: (replace(setup, runs=swept(setup.runs, settings)), _in_folder(args, name))
        for name, setup in (built.setups if isinstance(built, CrossedSetups) else {"": built}).items()
    }


def _carry_out(
    recipe: RecipeArguments, guidance: GuidanceConfig, plan: Plan, folder: Path, started: dict[str, Any]
) -> tuple[dict[str, Report], ConnectionError | None]:
    """Run and publish each setup; return their reports, and the error of a push that failed."""
    reports: dict[str, Report] = {}
    not_pushed = None
    for setup, own in plan.values():
        check_plan(recipe, own, guidance, setup)
    progress = _begin(recipe, plan, folder)
    for name, (setup, own) in plan.items():
        reports[name] = compare(recipe, own, guidance, setup, started, progress)
        summary = setup.summary()
        if PartialState().is_main_process:
            try:
                publish(reports[name], folder / name, own)
            except ConnectionError as error:
                not_pushed = error
            print(summary, end="")
    return reports, not_pushed


def _in_folder(args: TrainingArguments, name: str) -> TrainingArguments:
    """Return training arguments for one of several setups, which has a folder of its own."""
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
    description: str, arguments: type[A], defaults: Callable[[A], dict[str, Any]], file: str | None
) -> tuple[A, TrainingArguments, GuidanceConfig]:
    def checked(recipe: A) -> dict[str, Any]:
        check_choice("preset", recipe.preset, PRESETS)
        return defaults(recipe)

    parsed = parse(description, arguments, checked, refused=REFUSED, instead=INSTEAD, file=file)
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


def _begin(recipe: RecipeArguments, plan: Mapping[str, tuple[Setup, TrainingArguments]], folder: Path) -> Progress:
    """Print what will run, what is done already, and where it resumes."""
    progress = Progress(
        [
            run
            for setup, args in plan.values()
            for run in planned_runs(recipe, setup.runs, args.max_steps, Path(str(args.output_dir)))
        ]
    )
    if PartialState().is_main_process:
        for name, (setup, args) in plan.items():
            lines = in_lines(recipe, setup.runs(recipe.seeds[0]), args.max_steps)
            print("\n".join([f"{name}: {lines[0]}" if name else lines[0], *lines[1:]]))
        print(progress.begin(folder), flush=True)
    return progress
