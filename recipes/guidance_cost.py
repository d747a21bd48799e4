"""The cost of a guided step, compared with a plain step, the guide's forward, and the paper's formulation.

    accelerate launch recipes/guidance_cost.py --use_cpu
    accelerate launch recipes/guidance_cost.py --use_cpu --rows table
    accelerate launch recipes/guidance_cost.py --use_cpu --rows text --measure ridge
    accelerate launch recipes/guidance_cost.py --use_cpu --batch_sizes 32 64 128 256 --plot
    accelerate launch recipes/guidance_cost.py --target gpt2 --guide EleutherAI/pythia-70m --guide_shares_tokenizer
    accelerate launch recipes/guidance_cost.py --rows 256/224/2048 --guide timm/resnet50 --bf16 --torch_compile

It steps the real trainers on random data, in turns: a Trainer, a GuidanceTrainer, a Trainer with the paper's loss, and
the guide alone. On a CPU, times are CPU times on --threads threads; on a GPU, times between CUDA events.

    floor     plain step + forward of the whole guide without gradients, as it runs in the guided step
    overhead  guided step / floor; if no step runs the guide (weight 0, a cached guide), guided / plain step

--target is deep_fcn, wide_fcn, resnet50_without_skips, or an image or language model of transformers or timm: Hub id,
folder or timm/<architecture>. Its weights are random, and so are the guide's. Every field of TrainingArguments and
GuidanceConfig is a flag. Each row has its own folder in --cache_guide. --output_dir contains the tables as cost.json,
with command, seed, versions and hardware. Measured figures and their commands: recipes/guides/cost_and_caching.md.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_guidance[recipes]"]
#
# [tool.uv.sources]
# hf_guidance = { path = "..", editable = true }
# ///

from __future__ import annotations

import dataclasses
import gc
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import TrainingArguments, set_seed

from hf_guidance import GuidanceConfig, load_guide
from hf_guidance.experiments.command_line import parse
from hf_guidance.experiments.cost.measuring import Plan, measure_cost
from hf_guidance.experiments.cost.settings import Networks, Setting, parse_rows, text_guide
from hf_guidance.experiments.cost.table import cost_tables, plot_overhead
from hf_guidance.experiments.files import write_json
from hf_guidance.experiments.user_errors import tell_in_one_line
from hf_guidance.guide.configs import is_resnet
from hf_guidance.trainer.checks import check_writable
from hf_guidance.trainer.environment import environment
from hf_guidance.trainer.run_facts import command_facts

GOALS = {"64/64/512": 1.08, "128/64/1024": 1.08, "256/32/256": 1.15, "64/112/1024": 1.05}  # one thread, float32
TEXT_GOALS = {"16x64/64/128": 1.2, "32x64/256/256": 1.2, "64x32/256/128": 1.2}  # of 1024 tokens; 1.3 for regressions
REFUSED = {"--max_steps", "--num_train_epochs", "--resume_from_checkpoint"}


@dataclass
class Arguments:
    """The flags: what to measure, and how often."""

    target: str = field(default="deep_fcn", metadata={"help": "Name, Hub id, folder or timm/<architecture>."})
    guide: str = field(default="timm/resnet18", metadata={"help": "timm/<architecture>, Hub id or folder."})
    image_size: Optional[int] = field(
        default=None, metadata={"help": "Image size of the target, in pixels; default 64."}
    )
    guide_image_size: Optional[int] = field(
        default=None, metadata={"help": "Image size of the guide; default its own, else the target's."}
    )
    width: Optional[int] = field(default=None, metadata={"help": "Width of an FCN's blocks; default 512."})
    depth: Optional[int] = field(
        default=None, metadata={"help": "Number of an FCN's blocks; 18, 34 or 50 for a ResNet."}
    )
    length: int = field(default=128, metadata={"help": "Tokens per row, for a language model."})
    rows: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": f"One or more of batch/image/width, or of batchxlength/width/guide width for an RNN that a GPT-2 "
            f"guides; table means {', '.join(GOALS)}, text means {', '.join(TEXT_GOALS)}."
        },
    )
    batch_sizes: Optional[list[int]] = field(default=None, metadata={"help": "Batch sizes to measure."})
    plot: bool = field(default=False, metadata={"help": "Draw overhead against batch size."})
    rounds: int = field(default=5, metadata={"help": "Turns per variant."})
    steps: int = field(default=3, metadata={"help": "Counted steps per turn."})
    discard: int = field(default=1, metadata={"help": "Uncounted steps before them, per turn."})
    batches: int = field(
        default=4, metadata={"help": "Batches of data, repeated; rounded up to whole optimizer steps."}
    )
    skip_paper: bool = field(default=False, metadata={"help": "Do not measure the paper's formulation."})
    arithmetic: Optional[bool] = field(
        default=None, metadata={"help": "Count operations and measure the rate of the device; default on a GPU only."}
    )
    threads: int = field(default=1, metadata={"help": "CPU threads."})


def defaults(recipe: Arguments) -> dict[str, Any]:
    """Return the defaults of the other flags."""
    values: dict[str, Any] = {"output_dir": "outputs/guidance_cost", "per_device_train_batch_size": 64}
    values |= {"report_to": ["none"], "ddp_find_unused_parameters": False}
    values["measure"] = "linear_cka"  # the paper's
    return values | ({"guide_layers": ["Conv2d"]} if is_resnet(recipe.guide) else {})


def settings(recipe: Arguments, batch: int) -> list[Setting]:
    """Return the settings to measure, in order."""
    given = [name for name in ("batch_sizes", "image_size", "width") if getattr(recipe, name) is not None]
    if recipe.rows and given:
        raise ValueError(f"--rows names batch, image size and width: leave {', '.join(f'--{n}' for n in given)} out.")
    if recipe.rows:
        known = {"table": GOALS, "text": TEXT_GOALS}
        return parse_rows([row for word in recipe.rows for row in known.get(word, [word])])
    return [Setting(size, recipe.image_size or 64, recipe.width) for size in recipe.batch_sizes or [batch]]


def goal_of(recipe: Arguments, args: TrainingArguments, guidance: GuidanceConfig, setting: Setting) -> float | None:
    """Return the goal for the overhead, if this setting is one that the goals were set for; else None."""
    usual = (recipe.target, recipe.depth or 50, recipe.guide, recipe.threads) == ("deep_fcn", 50, "timm/resnet18", 1)
    plain = args.device.type == "cpu" and not (args.bf16 or args.torch_compile or args.gradient_checkpointing)
    if setting.length is not None:
        goal = TEXT_GOALS.get(setting.name) if plain and recipe.threads == 1 else None
        return goal and goal + 0.1 * guidance.measure.startswith("ridge")
    exact = guidance == GuidanceConfig(measure="linear_cka", guide_layers=["Conv2d"])
    return GOALS.get(setting.name) if usual and exact and plain else None


def measure(recipe: Arguments, args: TrainingArguments, guidance: GuidanceConfig, setting: Setting) -> dict[str, Any]:
    """Measure one row of the tables."""
    args.per_device_train_batch_size = setting.batch_size
    counted = args.device.type == "cuda" if recipe.arithmetic is None else recipe.arithmetic
    plan = Plan(recipe.rounds, recipe.steps, recipe.discard, paper=not recipe.skip_paper, arithmetic=counted)
    guidance = setting.guidance(guidance)
    if setting.length is None:
        guide = load_guide(recipe.guide, untrained=True, seed=args.seed)
    else:
        guide = load_guide(text_guide(setting, args.seed))
    networks = Networks(recipe.target, recipe.guide, recipe.depth, recipe.guide_image_size, recipe.length)
    set_seed(args.seed)
    micro = args.gradient_accumulation_steps
    target, rows = networks.build(setting, guide, math.ceil(recipe.batches / micro) * micro, args.seed)
    row = {"name": setting.name, "goal": goal_of(recipe, args, guidance, setting), **dataclasses.asdict(setting)}
    if guidance.cache_guide:  # each row has its own folder
        guidance = dataclasses.replace(guidance, cache_guide=f"{guidance.cache_guide}/{setting.name.replace('/', '-')}")
    return row | measure_cost(target, guide, rows, args, guidance, plan)


def main() -> None:
    """Parse the flags, measure, print and save."""
    tell_in_one_line()
    instead = "use --rounds and --steps instead; every call measures from the start"
    recipe, args, guidance = parse(__doc__ or "", Arguments, defaults, refused=REFUSED, instead=instead)
    if args.world_size > 1:
        raise ValueError(f"{args.world_size} processes: this recipe measures one process. Start one, with one GPU.")
    if guidance.similarity_batch == "global":
        raise ValueError(
            "--similarity_batch global needs several processes, but this recipe measures one: leave it out. The tables "
            "show the bytes that such a batch sends in any case."
        )
    for name in ("batches", "threads"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} is {getattr(recipe, name)}; it must be at least 1.")
    folder = Path(str(args.output_dir))
    check_writable(folder, "--output_dir")
    if args.device.type == "cpu":
        torch.set_num_threads(recipe.threads)
    chosen = settings(recipe, args.per_device_train_batch_size)
    command = ["accelerate", "launch", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    folders = {name: getattr(recipe, name) for name in ("target", "guide") if Path(getattr(recipe, name)).is_dir()}
    report: dict[str, Any] = {
        **command_facts(command, Arguments, TrainingArguments, GuidanceConfig),
        "seed": args.seed,
        "environment": environment(),
        "arguments": dataclasses.asdict(recipe) | {name: Path(path).name for name, path in folders.items()},
        "guidance": guidance.without_paths(),
        "training": {name: getattr(args, name) for name in ("bf16", "fp16", "torch_compile", "optim", "max_grad_norm")},
        "rows": [],
    }
    for setting in chosen:
        report["rows"].append(measure(recipe, args, guidance, setting))
        write_json(folder / "cost.json", report)  # keeps finished rows if a later one fails
        gc.collect()  # trainers are reference cycles and would stay in memory for the next row
    print("\n" + cost_tables(report["rows"]) + f"\n\n{folder}/cost.json")
    if recipe.plot:
        plot_overhead(report["rows"], folder / "overhead.png")
        print(f"{folder}/overhead.png")


if __name__ == "__main__":
    main()
