"""An RNN guided by a Transformer, and the other way round: the paper's sequence tasks.

    accelerate launch recipes/rnn_vs_transformer.py
    accelerate launch recipes/rnn_vs_transformer.py --task parity --seeds 0 1 2
    accelerate launch recipes/rnn_vs_transformer.py --task language_modeling --text_files shakespeare.txt

Matched runs (same seed, same initial weights, same data order): the target alone, guided by an untrained guide, guided
by a trained one, and the guide itself as the reference line. Every field of TrainingArguments and GuidanceConfig is a
flag (--seeds and --max_steps stand for --seed and --num_train_epochs), and changes all runs alike.
The results stand in --output_dir: a table, results.json, a figure, and each run's model. After a stop the same command
goes on where it was. Figures and their commands: recipes/README.md.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import PartialState
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
)

from hf_guidance import GuidanceConfig, load_guide
from hf_guidance.analysis.curves import plot_comparison
from hf_guidance.analysis.report import comparison_rows, markdown_table
from hf_guidance.comparison import Run, best_learning_rate, carry_out, write_json
from hf_guidance.runtime import environment, usable_cpus
from hf_guidance.targets import RNNConfig, RNNForCausalLM, RNNForSequenceClassification
from hf_guidance.tasks import TASKS, Task, build_task
from hf_guidance.tasks.parity import length_curriculum

RUNS = ("alone", "untrained_guide", "trained_guide", "guide_itself")


@dataclass
class RecipeArguments:
    """What is compared."""

    task: str = field(default="copy_paste", metadata={"help": f"One of {', '.join(TASKS)}."})
    preset: str = field(
        default="small", metadata={"help": "small (two CPU cores) or paper (the paper's sizes, a GPU)."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One set of matched runs for each."})
    runs: list[str] = field(default_factory=lambda: list(RUNS), metadata={"help": f"Some of {', '.join(RUNS)}."})
    learning_rates: Optional[list[float]] = field(
        default=None,
        metadata={"help": "Train the target alone at each of these; all runs take the best on validation data."},
    )
    longer_baseline: bool = field(
        default=False, metadata={"help": "Train the target alone longer too: twice the steps, and equal training time."}
    )
    eval_size: Optional[int] = field(default=None, metadata={"help": "Rows to validate, and rows to test, with."})
    guide_learning_rate: Optional[float] = field(default=None, metadata={"help": "For training the guide itself."})
    guide_max_steps: Optional[int] = field(default=None, metadata={"help": "For training the guide itself."})
    text_files: Optional[list[str]] = field(default=None, metadata={"help": "Text for language_modeling."})
    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "Hub id or folder, streamed."})
    dataset_config: str = field(default="wikitext-103-raw-v1", metadata={"help": "The dataset's configuration."})
    tokenizer: Optional[str] = field(default=None, metadata={"help": "Hub id or folder; otherwise a BPE is trained."})


@dataclass(frozen=True)
class Preset:
    """The full configuration of one comparison."""

    task: dict[str, Any]
    target: Callable[[Task], PreTrainedModel]
    guide: Callable[[Task], PreTrainedModel]
    training: dict[str, Any]
    guidance: dict[str, Any]
    guide_training: dict[str, Any]
    curriculum: tuple[int, ...] = ()  # longest string of each stage in the guide's own training


def recurrent(task: Task, **sizes: Any) -> PreTrainedModel:
    if "num_labels" in sizes:
        return RNNForSequenceClassification(RNNConfig(**_tokens(task), **sizes))
    return RNNForCausalLM(RNNConfig(**_tokens(task), **sizes))


def decoder(task: Task, length: int, **sizes: Any) -> PreTrainedModel:
    own: dict[str, Any] = {"n_positions": length, "loss_type": "ForCausalLM"}  # transformers finds none by GPT-2's name
    return GPT2LMHeadModel(GPT2Config(**_tokens(task), **own, **sizes))


def encoder(task: Task, **sizes: Any) -> PreTrainedModel:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    own: dict[str, Any] = {"classifier_pooling": "mean", "attn_implementation": "sdpa"}
    return ModernBertForSequenceClassification(ModernBertConfig(**(_tokens(task) | special), **own, **sizes))


def _tokens(task: Task) -> dict[str, Any]:
    tokenizer = task.processing_class
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {"vocab_size": len(tokenizer)} | ids


def preset(task: str, size: str) -> Preset:
    """The settings of a task; tuned on validation data, as the log in recipes/README.md tells."""
    small = size == "small"
    rnn: dict[str, Any]
    transformer: dict[str, Any]
    if task == "copy_paste":
        rnn = {"hidden_size": 128} if small else {"embedding_size": 256, "hidden_size": 512}
        transformer = {"n_embd": 64, "n_head": 4, "n_inner": 128} if small else {"n_embd": 512, "n_head": 16}
        data = {"min_length": 8, "max_length": 15, "eval_size": 2000, "test_size": 5000} if small else {}
        return Preset(
            task=data,
            target=partial(recurrent, num_hidden_layers=4, **rnn),
            guide=partial(decoder, length=32 if small else 96, n_layer=4, **transformer),
            training=_training(400 if small else 31_300, batch=128 if small else 256, rate=3e-3 if small else 1e-3),
            guidance={"guidance_weight": 0.03} if small else {},
            guide_training={},
        )
    if task == "parity":
        width = 64 if small else 512
        return Preset(
            task={"max_length": 20, "eval_size": 2000, "test_size": 5000} if small else {},
            target=partial(
                encoder,
                num_labels=2,
                num_hidden_layers=1,
                hidden_size=width,
                intermediate_size=2 * width,
                num_attention_heads=width // 16,
            ),
            guide=partial(recurrent, num_labels=2, num_hidden_layers=1, hidden_size=width),
            training=_training(1500 if small else 31_300, batch=256, rate=1e-3),
            guidance={"sample_axis": "token", "max_tokens": 512, "measure": "ridge"},
            guide_training={"max_grad_norm": 1.0, "learning_rate": 1e-3},
            curriculum=(5, 10, 20) if small else (5, 10, 20, 50),
        )
    rnn = {"hidden_size": 256} if small else {"embedding_size": 256, "hidden_size": 512}
    transformer = {"n_embd": 256, "n_head": 8} if small else {"n_embd": 512, "n_head": 16}
    return Preset(
        task={"block_size": 32, "vocab_size": 4096} if small else {"block_size": 50, "vocab_size": 32_000},
        target=partial(recurrent, num_hidden_layers=4, **rnn),
        guide=partial(decoder, length=64, n_layer=4, **transformer),
        training=_training(600 if small else 60_000, batch=64 if small else 256, rate=1e-3) | {"max_grad_norm": 0.25},
        guidance={"sample_axis": "token"},
        guide_training={},
    )


def _training(steps: int, batch: int, rate: float) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 2 * batch,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",  # a longer run then passes through the shorter one's states
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 40),
        "save_steps": max(1, steps // 4),
        "save_total_limit": 1,
        "report_to": ["none"],
        "ddp_find_unused_parameters": False,
    }


def parse() -> tuple[RecipeArguments, TrainingArguments, GuidanceConfig, Preset]:
    first: Any = HfArgumentParser(RecipeArguments, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]
    recipe, _ = first.parse_args_into_dataclasses(return_remaining_strings=True)
    if recipe.task not in TASKS or recipe.preset not in ("small", "paper") or not set(recipe.runs) <= set(RUNS):
        raise ValueError(
            f"--task {recipe.task} --preset {recipe.preset} --runs {' '.join(recipe.runs)}: tasks are "
            f"{', '.join(TASKS)}; presets are small, paper; runs are {', '.join(RUNS)}."
        )
    if refused := {"--seed", "--num_train_epochs", "--resume_from_checkpoint"} & {w.split("=")[0] for w in sys.argv}:
        raise ValueError(
            f"{', '.join(sorted(refused))}: this recipe takes --seeds and --max_steps, and the same command after "
            "a stop goes on by itself."
        )
    if recipe.longer_baseline and "alone" not in recipe.runs:
        raise ValueError(f"--longer_baseline is the run 'alone' for longer, but --runs is {' '.join(recipe.runs)}.")
    chosen = preset(recipe.task, recipe.preset)
    dataclasses: Any = (RecipeArguments, TrainingArguments, GuidanceConfig)
    parser: Any = HfArgumentParser(dataclasses, description=__doc__, allow_abbrev=False)
    folder = f"outputs/rnn_vs_transformer/{recipe.task}-{recipe.preset}"
    parser.set_defaults(output_dir=folder, **chosen.training, **chosen.guidance)
    return *parser.parse_args_into_dataclasses(), chosen


def task_options(recipe: RecipeArguments, chosen: Preset) -> dict[str, Any]:
    options = dict(chosen.task)
    if recipe.task == "language_modeling":
        names = ("text_files", "dataset", "dataset_config", "tokenizer")
        options |= {name: getattr(recipe, name) for name in names}
        options |= {"max_eval_blocks": recipe.eval_size} if recipe.eval_size else {}
    elif recipe.eval_size:
        options |= {"eval_size": recipe.eval_size, "test_size": recipe.eval_size}
    return options


def matched_runs(recipe: RecipeArguments, chosen: Preset, task: Task, args: TrainingArguments, seed: int) -> list[Run]:
    """The runs of one seed, in an order in which the trained guide exists before it is needed."""
    target, guide = partial(chosen.target, task), partial(chosen.guide, task)
    rates = {"learning_rate": recipe.guide_learning_rate, "max_steps": recipe.guide_max_steps}
    own = chosen.guide_training | {name: value for name, value in rates.items() if value is not None}
    rows = None
    if chosen.curriculum:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = length_curriculum(
            task.train_dataset, chosen.curriculum, own.get("max_steps", args.max_steps) * batch, seed
        )
        own["train_sampling_strategy"] = "sequential"
    trained = Path(str(args.output_dir)) / f"seed-{seed}" / "guide_itself"
    runs = [
        Run("alone", seed, target),
        Run("guide_itself", seed, guide, training=own, train_dataset=rows),
        Run("untrained_guide", seed, target, guide=lambda: load_guide(guide().config, seed=seed)),
        Run("trained_guide", seed, target, guide=lambda: load_guide(trained)),
    ]
    needed = {*recipe.runs, *(["guide_itself"] if "trained_guide" in recipe.runs else [])}
    return [run for run in runs if run.name in needed]


def longer(run: Run, steps: int, results: list[dict[str, Any]]) -> Run:
    """The unguided run for twice the steps, or a little more than the time of the slowest guided run of its seed."""
    own = [r for r in results if r["seed"] == run.seed]
    guided = max((r["seconds"] for r in own if r["guide"]), default=0.0)
    times = guided / next(r["seconds"] for r in own if r["run"] == "alone")
    return replace(run, name="alone_longer", training={"max_steps": int(steps * max(2.0, 1.1 * times) + 1)})


def compare(
    recipe: RecipeArguments, args: TrainingArguments, guidance: GuidanceConfig, chosen: Preset
) -> dict[str, Any]:
    """Carry out every run; what is already done is read, what was interrupted goes on."""
    options = task_options(recipe, chosen)
    task, folder = build_task(recipe.task, **options), Path(str(args.output_dir))
    alone = [Run("alone", seed, partial(chosen.target, task)) for seed in recipe.seeds]
    data = {"task": recipe.task, **options}
    carry = partial(carry_out, task=task, args=args, guidance=guidance, folder=folder, data=data)
    search: list[dict[str, Any]] = []
    if recipe.learning_rates:
        args.learning_rate, search = best_learning_rate(alone, recipe.learning_rates, carry, task.higher_is_better)
    found = {r["seed"]: r | {"run": "alone"} for r in search if r["settings"]["learning_rate"] == args.learning_rate}
    results = [
        found[seed] if found and run.name == "alone" else carry(run)
        for seed in recipe.seeds
        for run in matched_runs(recipe, chosen, task, args, seed)
    ]
    if recipe.longer_baseline:
        results += [carry(longer(run, args.max_steps, results)) for run in alone]
    return {
        "recipe": "rnn_vs_transformer",
        "command": shlex.join(["accelerate", "launch", "recipes/rnn_vs_transformer.py", *sys.argv[1:]]),
        "environment": environment(),
        "task": {"name": task.name, "description": task.description, "metric": task.metric},
        "learning_rate_search": [{k: r[k] for k in ("run", "seed", "validation")} for r in search],
        "runs": results,
    }


def publish(report: dict[str, Any], folder: Path, percent: bool) -> None:
    """Table, results.json and figure, the numbers first: a failing plot must not lose them."""
    metric = report["task"]["metric"]
    report["table"] = comparison_rows(report["runs"], metric=metric)
    write_json(folder / "results.json", report)
    print("\n" + markdown_table(report["table"], metric, percent) + "\n")
    plot_comparison(report["runs"], metric, folder / "comparison.png", percent=percent, log=not percent)
    print(f"{folder}/results.json, {folder}/comparison.png")


def main() -> None:
    recipe, args, guidance, chosen = parse()
    if args.device.type == "cpu":  # a bare `accelerate launch` leaves one thread
        torch.set_num_threads(max(1, usable_cpus() // args.world_size))
    try:
        report = compare(recipe, args, guidance, chosen)
    except KeyboardInterrupt:
        print(
            f"\nStopped. What was done is in {args.output_dir}; the same command goes on from there.", file=sys.stderr
        )
        sys.exit(130)
    if PartialState().is_main_process:
        publish(report, Path(str(args.output_dir)), percent=recipe.task != "language_modeling")
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
