"""What a guided step costs: beside a plain step, the guide's forward, and the paper's formulation.

    accelerate launch recipes/guidance_cost.py --use_cpu
    accelerate launch recipes/guidance_cost.py --use_cpu --rows table
    accelerate launch recipes/guidance_cost.py --use_cpu --batch_sizes 32 64 128 256 --plot
    accelerate launch recipes/guidance_cost.py --target gpt2 --guide EleutherAI/pythia-70m --guide_shares_tokenizer
    accelerate launch recipes/guidance_cost.py --rows 256/224/2048 --guide timm/resnet50 --bf16 --torch_compile

It steps the real trainers on random data, in turns: a Trainer, a GuidanceTrainer, a Trainer with the paper's loss, and
the guide alone. On a CPU the times are those of the processor on --threads threads, on a GPU those between CUDA events.

    floor     plain step + forward of the whole guide without gradients, as it runs in the guided step
    overhead  guided step / floor; where no step runs the guide (weight 0, a cached guide), guided / plain step

A target is deep_fcn, wide_fcn, resnet50_without_skips, or any image or language model of transformers or timm by Hub
id, folder or timm/<architecture>; its weights are random, and so are the guide's. Every field of TrainingArguments and
GuidanceConfig is a flag; each row has its own folder in --cache_guide. The tables stand in --output_dir as cost.json,
with command, seed, versions and hardware.
"""

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
from hf_guidance.experiments.cost.settings import Networks, Setting, parse_rows
from hf_guidance.experiments.cost.table import cost_tables, plot_overhead
from hf_guidance.experiments.files import check_writable, write_json
from hf_guidance.guide.configs import is_resnet
from hf_guidance.trainer.environment import environment
from hf_guidance.trainer.run_facts import command_facts

GOALS = {"64/64/512": 1.08, "128/64/1024": 1.08, "256/32/256": 1.15, "64/112/1024": 1.05}  # one thread, float32
REFUSED = {"--max_steps", "--num_train_epochs", "--resume_from_checkpoint"}


@dataclass
class Arguments:
    """What is measured, and how often."""

    target: str = field(default="deep_fcn", metadata={"help": "A name, Hub id, folder or timm/<architecture>."})
    guide: str = field(default="timm/resnet18", metadata={"help": "timm/<architecture>, Hub id or folder."})
    image_size: Optional[int] = field(default=None, metadata={"help": "The target's, in pixels; 64 if left out."})
    guide_image_size: Optional[int] = field(default=None, metadata={"help": "Left out, its own or the target's."})
    width: Optional[int] = field(default=None, metadata={"help": "Of an FCN's blocks; 512 if left out."})
    depth: Optional[int] = field(default=None, metadata={"help": "An FCN's blocks, or 18, 34 or 50 of a ResNet."})
    length: int = field(default=128, metadata={"help": "Tokens a row, of a language model."})
    rows: Optional[list[str]] = field(
        default=None, metadata={"help": f"batch/image/width, several of them; table stands for {', '.join(GOALS)}."}
    )
    batch_sizes: Optional[list[int]] = field(default=None, metadata={"help": "Measure each of them."})
    plot: bool = field(default=False, metadata={"help": "Draw overhead against batch size."})
    rounds: int = field(default=5, metadata={"help": "Turns of each variant."})
    steps: int = field(default=3, metadata={"help": "Counted steps a turn."})
    discard: int = field(default=1, metadata={"help": "Steps before them."})
    batches: int = field(default=4, metadata={"help": "Batches of data, over and over; whole steps of them."})
    skip_paper: bool = field(default=False, metadata={"help": "Leave the paper's formulation out."})
    arithmetic: Optional[bool] = field(
        default=None, metadata={"help": "Count operations and measure the device's rate; on a GPU if left out."}
    )
    threads: int = field(default=1, metadata={"help": "Of the CPU."})


def defaults(recipe: Arguments) -> dict[str, Any]:
    """What the flags are where they are not given."""
    values: dict[str, Any] = {"output_dir": "outputs/guidance_cost", "per_device_train_batch_size": 64}
    values |= {"report_to": ["none"], "ddp_find_unused_parameters": False}
    return values | ({"guide_layers": ["Conv2d"]} if is_resnet(recipe.guide) else {})


def settings(recipe: Arguments, batch: int) -> list[Setting]:
    """What is measured, one after the other."""
    given = [name for name in ("batch_sizes", "image_size", "width") if getattr(recipe, name) is not None]
    if recipe.rows and given:
        raise ValueError(f"--rows names batch, image size and width: leave {', '.join(f'--{n}' for n in given)} out.")
    if recipe.rows:
        return parse_rows([row for word in recipe.rows for row in (GOALS if word == "table" else [word])])
    return [Setting(size, recipe.image_size or 64, recipe.width) for size in recipe.batch_sizes or [batch]]


def goal_of(recipe: Arguments, args: TrainingArguments, guidance: GuidanceConfig, setting: Setting) -> float | None:
    """The overhead to reach, where what is measured is what the goals are of."""
    usual = (recipe.target, recipe.depth or 50, recipe.guide, recipe.threads) == ("deep_fcn", 50, "timm/resnet18", 1)
    exact = guidance == GuidanceConfig(guide_layers=["Conv2d"])
    plain = args.device.type == "cpu" and not (args.bf16 or args.torch_compile or args.gradient_checkpointing)
    return GOALS.get(setting.name) if usual and exact and plain else None


def measure(recipe: Arguments, args: TrainingArguments, guidance: GuidanceConfig, setting: Setting) -> dict[str, Any]:
    """One row of the tables."""
    args.per_device_train_batch_size = setting.batch_size
    counted = args.device.type == "cuda" if recipe.arithmetic is None else recipe.arithmetic
    plan = Plan(recipe.rounds, recipe.steps, recipe.discard, paper=not recipe.skip_paper, arithmetic=counted)
    guide = load_guide(recipe.guide, untrained=True, seed=args.seed)
    networks = Networks(recipe.target, recipe.guide, recipe.depth, recipe.guide_image_size, recipe.length)
    set_seed(args.seed)
    micro = args.gradient_accumulation_steps
    target, rows = networks.build(setting, guide, math.ceil(recipe.batches / micro) * micro, args.seed)
    row = {"name": setting.name, "goal": goal_of(recipe, args, guidance, setting), **dataclasses.asdict(setting)}
    if guidance.cache_guide:  # each row's own
        guidance = dataclasses.replace(guidance, cache_guide=f"{guidance.cache_guide}/{setting.name.replace('/', '-')}")
    return row | measure_cost(target, guide, rows, args, guidance, plan)


def main() -> None:
    """Measure, print and save."""
    instead = "use --rounds and --steps instead; every call measures from the start"
    recipe, args, guidance = parse(__doc__ or "", Arguments, defaults, refused=REFUSED, instead=instead)
    if args.world_size > 1:
        raise ValueError(f"{args.world_size} processes: the cost is that of one; start one, and name one GPU.")
    if guidance.similarity_batch == "global":
        raise ValueError(
            "similarity_batch='global' needs several processes, and the cost is that of one: leave it out. What such "
            "a batch sends is in the tables all the same."
        )
    for name in ("batches", "threads"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}; it must be at least 1.")
    folder = Path(str(args.output_dir))
    check_writable(folder)
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
        write_json(folder / "cost.json", report)  # what is measured is kept though a later row fails
        gc.collect()  # a trainer is a cycle: three of them and their optimizers would stay for the next row
    print("\n" + cost_tables(report["rows"]) + f"\n\n{folder}/cost.json")
    if recipe.plot:
        plot_overhead(report["rows"], folder / "overhead.png")
        print(f"{folder}/overhead.png")


if __name__ == "__main__":
    main()
