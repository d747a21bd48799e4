"""Targets by guides: which architecture's prior does each target lack on these images?

    accelerate launch recipes/which_prior.py --use_cpu
    accelerate launch recipes/which_prior.py --use_cpu --targets wide_fcn --guides resnet18 vit timm/convnext_atto
    accelerate launch recipes/which_prior.py --dataset zalando-datasets/fashion_mnist --train_size 5000

Each target is trained alone, and guided by each guide, with the same seed, initial weights and data order. A guide
that is named by its architecture has random weights, so that only its architecture can help; one that is a folder has
the weights there. The table and matrix.png show the gain on test data, in brackets Student's interval over the
seeds.

    targets  deep_fcn, wide_fcn, resnet50_without_skips
    guides   resnet18, vit, fcn (small ones), timm/<name>, a Hub id, or a folder

Two networks that cannot be compared are said and left out. Every field of TrainingArguments and GuidanceConfig is a
flag. Use --seeds instead of --seed, and --max_steps instead of --num_train_epochs. --output_dir contains matrix.json,
matrix.png, and a folder for each target with its table, results.json, figures and models. Rerun the same command to
resume.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_guidance[recipes]"]
#
# [tool.uv.sources]
# hf_guidance = { path = "..", editable = true }
# ///

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments, ViTConfig

from hf_guidance import load_guide
from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.command_line import check_choice
from hf_guidance.experiments.files import identify_folder
from hf_guidance.experiments.recipe import launch, training_defaults
from hf_guidance.experiments.recipe_runs import CrossedSetups, Setup
from hf_guidance.experiments.run import Run
from hf_guidance.guide.hub_errors import hub_fault, one_line
from hf_guidance.targets import FCNConfig
from hf_guidance.targets.vision import VISION_TARGETS, small_resnet, vision_target
from hf_guidance.tasks import Task, image_classification
from hf_guidance.tasks.image_decoding import PixelFormat
from hf_guidance.tasks.pixel_formats import check_takes, pixel_format_of

SMALL: dict[str, dict[str, Any]] = {  # sizes of targets
    "deep_fcn": {"width": 256, "depth": 49},
    "wide_fcn": {"width": 1024},
    "resnet50_without_skips": {"width": 16},
}
GUIDES: dict[str, Callable[[int], Any]] = {  # by the size of the images
    "resnet18": lambda size: small_resnet("resnet18", 16),
    "vit": lambda size: ViTConfig(
        image_size=size,
        patch_size=max(1, size // 4),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
    ),
    "fcn": lambda size: FCNConfig.wide(image_size=size, hidden_size=256),
}


@dataclass
class Arguments(RecipeArguments):
    """The flags: targets, guides and data."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of each cell."})
    targets: list[str] = field(
        default_factory=lambda: ["deep_fcn", "resnet50_without_skips"],
        metadata={"help": f"Some of {', '.join(VISION_TARGETS)}."},
    )
    guides: list[str] = field(
        default_factory=lambda: list(GUIDES),
        metadata={"help": f"Some of {', '.join(GUIDES)}, timm/<name>, Hub ids, or folders of trained networks."},
    )
    dataset: str = field(default="digits", metadata={"help": "Hub id or local folder; digits is scikit-learn's."})
    dataset_config: Optional[str] = field(default=None, metadata={"help": "Configuration of the dataset."})
    image_size: Optional[int] = field(default=None, metadata={"help": "Size of the images, in pixels."})
    train_size: Optional[int] = field(default=None, metadata={"help": "Number of training rows; default all."})

    def __post_init__(self) -> None:
        for target in self.targets:
            check_choice("targets", target, VISION_TARGETS)
        for guide in self.guides:
            if "/" not in guide and not os.path.isdir(guide):
                check_choice("guides", guide, [*GUIDES, "timm/<name>", "a Hub id", "a folder"])
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size is {self.image_size}; it must be at least 1.")
        if self.runs:
            raise ValueError("--runs: this recipe trains all of them; choose with --targets and --guides.")
        self.image_size = self.image_size or (224 if self.preset == "paper" else 8 if self.dataset == "digits" else 28)


def defaults(recipe: Arguments) -> dict[str, Any]:
    """Return the defaults of the other flags."""
    steps, batch = (300, 128) if recipe.preset == "small" else (100_000, 256)
    values = training_defaults(steps, batch, 1e-3)
    name = Path(recipe.dataset).name
    return values | {"output_dir": f"outputs/which_prior/{name}-{recipe.preset}", "remove_unused_columns": False}


def build(recipe: Arguments, args: TrainingArguments) -> CrossedSetups:
    """Build the setup of each target from the flags."""
    names = {run_named(guide): Path(guide).name for guide in recipe.guides}
    if len(names) < len(recipe.guides):
        raise ValueError(f"--guides {' '.join(recipe.guides)}: two of them have the same name.")
    left_out = {guide: why for guide in recipe.guides if (why := why_left_out(guide, int(recipe.image_size or 0)))}
    said = [f"{run_named(guide)} is left out: {why}" for guide, why in left_out.items()]
    if len(left_out) == len(recipe.guides):
        raise ValueError(f"--guides: none can be loaded. {' '.join(said)}")
    if said and PartialState().is_main_process:
        print("\n".join(said), flush=True)
    recipe = replace(recipe, guides=[guide for guide in recipe.guides if guide not in left_out])
    return CrossedSetups({target: setup_of(recipe, target) for target in recipe.targets}, names)


def why_left_out(guide: str, size: int) -> str:
    """Explain why a guide cannot be loaded, or takes no images of its own size; empty if it can be used."""
    try:
        own = format_of(guide, size)
        if own != PixelFormat(size):
            check_takes(network_of(guide, 0, size)(), own, guide)
    except (OSError, ValueError) as error:
        return (hub_fault(guide, error) or one_line(error)) if isinstance(error, OSError) else str(error)
    return ""


def format_of(guide: str, size: int) -> PixelFormat:
    """Return size and normalisation of a guide's images."""
    return PixelFormat(size) if guide in GUIDES else pixel_format_of(guide, size, trained=os.path.isdir(guide))


def network_of(guide: str, seed: int, size: int) -> Callable[[], Any]:
    """Return what loads a guide from its folder, or builds it with random weights."""
    if os.path.isdir(guide):
        return partial(load_guide, guide)
    return partial(load_guide, GUIDES[guide](size) if guide in GUIDES else guide, untrained=True, seed=seed)


def run_named(guide: str) -> str:
    """Return the name of the runs that a guide guides."""
    return "guided_by_" + re.sub(r"\W+", "_", Path(guide).name)


def setup_of(recipe: Arguments, name: str) -> Setup:
    """Build the setup of one target."""
    pixels = PixelFormat(int(recipe.image_size or 0))
    options: dict[str, Any] = {
        key: getattr(recipe, key) for key in ("dataset", "dataset_config", "train_size", "eval_size")
    }
    load = partial(image_classification, **options, target=pixels)
    task = load()
    data: dict[str, Any] = {**options, "task": task.name, "target": vars(pixels)}
    if os.path.isdir(recipe.dataset):
        data["dataset"] = {"name": Path(recipe.dataset).resolve().name, "files": identify_folder(recipe.dataset)}
    labels: dict[str, Any] = {
        "label2id": {label: i for i, label in enumerate(task.labels)},
        "id2label": dict(enumerate(task.labels)),
    }
    sizes: dict[str, Any] = SMALL[name] if recipe.preset == "small" else {}
    target: Callable[[], PreTrainedModel] = partial(vision_target, name, pixels.size, **sizes, **labels)
    return Setup(
        task=task,
        data=data,
        target=target,
        runs=lambda seed: [
            Run("alone", seed, target),
            *(guided(guide, seed, target, pixels, load) for guide in recipe.guides),
        ],
        train_dataset=lambda seed: task.train_dataset.with_seed(seed),
        leaves_out=True,
    )


def guided(
    guide: str, seed: int, target: Callable[[], PreTrainedModel], pixels: PixelFormat, load: Callable[..., Task]
) -> Run:
    """Return the run that a guide guides, on images of the guide's own size too if it needs them."""
    network, own = network_of(guide, seed, pixels.size), format_of(guide, pixels.size)
    if own == pixels:
        return Run(run_named(guide), seed, target, guide=network)
    task = load(guide=own)
    task = replace(task, train_dataset=task.train_dataset.with_seed(seed))
    return Run(run_named(guide), seed, target, guide=network, task=task)


if __name__ == "__main__":
    launch(__doc__ or "", Arguments, defaults, build)
