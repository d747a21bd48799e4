"""Networks called untrainable on images, guided by a ResNet or any other network: the paper's object recognition.

    accelerate launch recipes/fcn_vs_resnet.py
    accelerate launch recipes/fcn_vs_resnet.py --dataset zalando-datasets/fashion_mnist --seeds 0 1 2
    accelerate launch recipes/fcn_vs_resnet.py --dataset ILSVRC/imagenet-1k --preset paper --guide timm/resnet18.a1_in1k

Matched runs (same seed, same initial weights, same data order), chosen with --runs:

    alone                    the target without guidance
    untrained_guide          guided by a guide with random weights
    trained_guide            guided by the guide as it is on the Hub or in a folder, or as --train_guide trained it
    untrained_guide_stopped  as above, guidance stopping at --stop_step (guidance as initialisation)
    trained_guide_stopped
    shuffled_guide           a control: the untrained guide sees the images of other rows
    noise_guide              the untrained guide sees noise
    distillation             trained on the logits of the guide that --train_guide trained, or of a trained --guide
                             with the data's classes
    guide_itself             that guide

Every field of TrainingArguments and GuidanceConfig is a flag (--seeds and --max_steps stand for --seed and
--num_train_epochs), and changes all runs alike: --guidance_stop_step 300, --prealign_steps 100 --guide_input
prealign_noise, --guide_batch_norm batch. The results stand in --output_dir: a table, results.json, figures, and each
run's model. After a stop the same command goes on where it was. Figures and their commands: recipes/README.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments

from hf_guidance import load_guide
from hf_guidance.experiments.command_line import check_choice
from hf_guidance.experiments.distillation import DistillationTrainer, check_classes
from hf_guidance.experiments.recipe import (
    Comparison,
    RecipeArguments,
    identify_folder,
    launch,
    training_defaults,
)
from hf_guidance.experiments.run import Run
from hf_guidance.guide.configs import is_resnet
from hf_guidance.guide.loading import untrained_network
from hf_guidance.targets.vision import VISION_TARGETS, vision_target
from hf_guidance.tasks import Task, image_classification
from hf_guidance.tasks.image_decoding import AUGMENTATIONS, PixelFormat
from hf_guidance.tasks.images import check_last_batch, count_skipped
from hf_guidance.tasks.pixel_formats import check_sees, check_takes, pixel_format_of

RUNS = (
    "alone",
    "guide_itself",
    "untrained_guide",
    "untrained_guide_stopped",
    "trained_guide",
    "trained_guide_stopped",
    "shuffled_guide",
    "noise_guide",
    "distillation",
)
FROM_ITS_WEIGHTS = ("trained_guide", "trained_guide_stopped", "distillation")
IMAGENET = "ILSVRC/imagenet-1k"


@dataclass
class Arguments(RecipeArguments):
    """What is compared."""

    target: str = field(default="deep_fcn", metadata={"help": f"One of {', '.join(VISION_TARGETS)}."})
    width: Optional[int] = field(default=None, metadata={"help": "Of an FCN's blocks."})
    depth: Optional[int] = field(default=None, metadata={"help": "An FCN's blocks, or 18, 34 or 50 of a ResNet."})
    image_size: Optional[int] = field(default=None, metadata={"help": "The target's, in pixels."})
    dropout: Optional[float] = field(default=None, metadata={"help": "Of an FCN's blocks."})
    guide: Optional[str] = field(
        default=None,
        metadata={"help": "timm/<name>, Hub id or folder; left out, the paper's ResNet with random weights."},
    )
    untrained_guide: bool = field(default=False, metadata={"help": "Random weights for --guide, and not its own."})
    train_guide: bool = field(default=False, metadata={"help": "Train the guide on the same data first, and keep it."})
    guide_image_size: Optional[int] = field(
        default=None, metadata={"help": "Left out, what it was trained on or is made for, else the target's."}
    )
    stop_step: Optional[int] = field(
        default=None, metadata={"help": "Where the *_stopped runs stop guidance; a third of the steps if left out."}
    )
    runs: Optional[list[str]] = field(
        default=None, metadata={"help": f"Some of {', '.join(RUNS)}; left out, alone and those of the guide named."}
    )
    dataset: str = field(default="digits", metadata={"help": "Hub id or local folder; digits is scikit-learn's."})
    dataset_config: Optional[str] = field(default=None, metadata={"help": "The dataset's configuration."})
    image_column: Optional[str] = field(default=None, metadata={"help": "Left out, the one column with images."})
    label_column: Optional[str] = field(default=None, metadata={"help": "Left out, the column with classes."})
    num_labels: Optional[int] = field(default=None, metadata={"help": "Of a dataset that does not name its classes."})
    streaming: Optional[bool] = field(default=None, metadata={"help": "Read while training; so ImageNet by default."})
    train_size: Optional[int] = field(default=None, metadata={"help": "Rows to train on; all if left out."})
    shuffle_buffer: int = field(default=2000, metadata={"help": "Images of a stream shuffled among one another."})
    augmentation: Optional[str] = field(default=None, metadata={"help": f"One of {', '.join(AUGMENTATIONS)}."})
    on_bad_image: str = field(default="raise", metadata={"help": "raise, or skip what cannot be decoded and count it."})

    def __post_init__(self) -> None:
        for name, value, possible in (
            ("preset", self.preset, ("small", "paper")),
            ("target", self.target, VISION_TARGETS),
            *(("runs", run, RUNS) for run in self.runs or ()),
        ):
            check_choice(name, value, possible)
        for name in ("width", "depth", "image_size", "guide_image_size", "shuffle_buffer"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"--{name} is {size}; it must be at least 1.")
        small = self.preset == "small"
        self.guide_is_named = self.guide is not None
        self.guide = self.guide or ("timm/resnet50" if self.target == "resnet50_without_skips" else "timm/resnet18")
        self.image_size = self.image_size or (224 if not small else 8 if self.dataset == "digits" else 28)
        self.streaming = self.dataset == IMAGENET if self.streaming is None else self.streaming
        self.augmentation = self.augmentation or ("none" if small else "crop_flip")
        self.runs = self.runs or self._runs_of_the_guide()
        if self.train_guide and os.path.isdir(self.guide):
            raise ValueError(f"--train_guide trains an architecture from random weights; {self.guide} is a folder.")
        if not self.train_guide and "guide_itself" in self.runs:
            raise ValueError("the run guide_itself trains the guide on the data: add --train_guide.")
        needing = [run for run in self.runs if run in FROM_ITS_WEIGHTS]
        if needing and not self.train_guide and (self.untrained_guide or not self.guide_is_named):
            raise ValueError(
                f"the run {needing[0]} needs a trained guide: name one with --guide and leave --untrained_guide out, "
                "or add --train_guide."
            )
        if self.target == "resnet50_without_skips" and (self.width or self.dropout is not None):
            raise ValueError("--width and --dropout are of the FCNs; a ResNet has --depth 18, 34 or 50.")

    def _runs_of_the_guide(self) -> list[str]:
        if self.train_guide:
            return ["alone", "guide_itself", "untrained_guide", "trained_guide"]
        return ["alone", "trained_guide" if self.guide_is_named and not self.untrained_guide else "untrained_guide"]


def target_of(recipe: Arguments, task: Task) -> PreTrainedModel:
    """The network called untrainable, with random weights."""
    names = {"label2id": {name: i for i, name in enumerate(task.labels)}, "id2label": dict(enumerate(task.labels))}
    small = recipe.preset == "small"
    deep = recipe.target == "deep_fcn"
    return vision_target(
        recipe.target,
        int(recipe.image_size or 0),
        width=recipe.width or (256 if small and deep else 1024 if small else None),
        depth=recipe.depth or (49 if small and deep else None),
        dropout=recipe.dropout if recipe.dropout is not None else (0.1 if deep else 0.0),
        **names,
    )


def defaults(recipe: Arguments) -> dict[str, Any]:
    """What the flags are where they are not given."""
    small = recipe.preset == "small"
    batch = 128 if small and recipe.dataset == "digits" else 256  # digits are to be done in minutes on two cores
    values = training_defaults(300 if small else 100_000, batch, 1e-3)
    name = Path(recipe.dataset).name
    values["output_dir"] = f"outputs/fcn_vs_resnet/{recipe.target}-{name}-{recipe.preset}"
    values["remove_unused_columns"] = False  # the rows are images still
    if recipe.streaming:
        values["accelerator_config"] = {"dispatch_batches": False}  # or rank 0 decodes for all
    if small:
        values["measure"] = "ridge"  # for linear CKA see the log in recipes/README.md
    if is_resnet(str(recipe.guide)):
        values["guide_layers"] = ["Conv2d"]  # the paper's: every convolution
    return values


def build(recipe: Arguments, args: TrainingArguments) -> Comparison:
    """Data and runs as the flags ask for them."""
    guide = str(recipe.guide)
    size = int(recipe.image_size or 0)
    chosen = set(recipe.runs or ())
    trained = not recipe.train_guide and bool({*FROM_ITS_WEIGHTS} & chosen)
    head = AutoModelForImageClassification if "distillation" in chosen else None
    network = load_guide(guide, untrained=not trained, auto_class=head)
    check_sees(network, guide)
    own = pixel_format_of(guide, size, trained=trained, given=recipe.guide_image_size)
    check_takes(network, own, guide)
    options: dict[str, Any] = {
        name: getattr(recipe, name)
        for name in (
            "dataset",
            "dataset_config",
            "streaming",
            "augmentation",
            "image_column",
            "label_column",
            "num_labels",
            "eval_size",
            "shuffle_buffer",
            "on_bad_image",
        )
    }
    if recipe.train_size is not None:
        options["train_size"] = recipe.train_size
    pixels = PixelFormat(size, own.mean, own.std)
    load = partial(image_classification, **options)
    task = load(target=pixels, guide=own)
    if "distillation" in chosen and not recipe.train_guide:
        check_classes(guide, task.labels)
    alike = {"alone": task, "itself": load(target=own) if recipe.train_guide and own != pixels else task}
    data = {**options, "guide_source": Path(guide).name}
    if os.path.isdir(recipe.dataset):
        data["dataset"] = {"name": Path(recipe.dataset).resolve().name, "files": identify_folder(recipe.dataset)}
    if recipe.streaming:
        data["workers"] = args.dataloader_num_workers  # they share the files, so that their number makes the order
    if not args.dataloader_drop_last:
        check_last_batch(task, args.train_batch_size)
    return Comparison(
        task=task,
        data={"task": task.name, **data, "target": vars(pixels), "guide": vars(own)},
        target=partial(target_of, recipe, task),
        runs=partial(matched_runs, recipe, args, alike),
        train_dataset=lambda seed: task.train_dataset.with_seed(seed),
        summary=partial(count_skipped, task),
    )


def matched_runs(recipe: Arguments, args: TrainingArguments, tasks: dict[str, Task], seed: int) -> list[Run]:
    """The runs of one seed, in an order in which the trained guide exists before it is needed."""
    source, labels = str(recipe.guide), len(tasks["alone"].labels)
    target = partial(target_of, recipe, tasks["alone"])
    trained = Path(str(args.output_dir)) / f"seed-{seed}" / "guide_itself"
    third = max(1, args.max_steps // 3)
    stopped = [run for run in recipe.runs or () if run.endswith("_stopped")]
    if stopped and recipe.stop_step is not None and not 0 < recipe.stop_step < args.max_steps:
        raise ValueError(
            f"--stop_step is {recipe.stop_step}; {stopped[0]} stops guidance within its {args.max_steps} steps: "
            f"from 1 to {args.max_steps - 1}."
        )
    stop = {"guidance_stop_step": third if recipe.stop_step is None else recipe.stop_step}
    untrained: Callable[[], Any] = partial(load_guide, source, untrained=True, seed=seed)
    given: Callable[..., Any] = partial(load_guide, trained if recipe.train_guide else source)

    def distil(**kwargs: Any) -> DistillationTrainer:
        return DistillationTrainer(guide=given(auto_class=AutoModelForImageClassification), **kwargs)

    needs = "guide_itself" if recipe.train_guide else None
    own_task = replace(tasks["itself"], train_dataset=tasks["itself"].train_dataset.with_seed(seed))
    itself = partial(untrained_network, source, AutoModelForImageClassification, num_labels=labels)
    runs = [
        Run("alone", seed, target),
        Run("guide_itself", seed, itself, training=recipe.guide_training(), task=own_task),
        Run("untrained_guide", seed, target, guide=untrained),
        Run("untrained_guide_stopped", seed, target, guide=untrained, guidance=stop),
        Run("trained_guide", seed, target, guide=given, needs=needs, like=untrained),
        Run("trained_guide_stopped", seed, target, guide=given, needs=needs, like=untrained, guidance=stop),
        Run("shuffled_guide", seed, target, guide=untrained, guidance={"guide_input": "shuffled"}),
        Run("noise_guide", seed, target, guide=untrained, guidance={"guide_input": "noise"}),
        Run("distillation", seed, target, trainer=distil),
    ]
    chosen = set(recipe.runs or ())
    if recipe.train_guide and chosen & {*FROM_ITS_WEIGHTS}:
        chosen.add("guide_itself")
    return [run for run in runs if run.name in chosen]


if __name__ == "__main__":
    launch(__doc__ or "", Arguments, defaults, build)
