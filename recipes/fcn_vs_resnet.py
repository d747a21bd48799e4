"""Untrainable networks on images, guided by a ResNet or any other network: the paper's object recognition.

    accelerate launch recipes/fcn_vs_resnet.py
    accelerate launch recipes/fcn_vs_resnet.py --dataset zalando-datasets/fashion_mnist --seeds 0 1 2
    accelerate launch recipes/fcn_vs_resnet.py --dataset ILSVRC/imagenet-1k --preset paper --guide timm/resnet18.a1_in1k
    accelerate launch recipes/fcn_vs_resnet.py --use_cpu --claim convnet_without_skips

--claim stands for the flags of a claim of the paper on two CPU cores, with a tuned baseline and five seeds:
convnet_without_skips, wide_fcn or deep_fcn. deep_fcn_controls and deep_fcn_measures put what else the deep FCN may be
guided by beside it, on three seeds; a claim's name with _cached has the guide kept in a cache, that of an FCN with
_initialisation guides it at the start only. --config is a file with flags. A guidance flag with several values
(--measure ridge linear_cka) trains each guided run at each of them.

Matched runs (same seed, same initial weights, same data order), chosen with --runs:

    alone                    the target without guidance
    alone_shifted            the same, with its images at random places (needs --object_size)
    untrained_guide          guided by a guide with random weights
    trained_guide            guided by a trained guide: from the Hub, from a folder, or trained here (--train_guide)
    *_stopped, *_decayed     as untrained_guide or trained_guide, but guidance stops at --stop_step, or decays until it
    *_until_similar          the same, but guidance stops at --stop_similarity
    *_prealigned, *_prealigned_on_noise    the same, but a tenth of the steps is guidance alone, on data or noise
    trained_guide_cached     as trained_guide, by debiased CKA of 1024 numbers a layer, kept in a cache
    shuffled_guide           control: the untrained guide sees the images of other rows
    noise_guide              control: the untrained guide sees noise
    reversed_layers          control: the trained guide's layers in reverse order
    own_architecture         control: the guide is the target's own architecture, with other random weights
    distillation             trained on the logits of a trained guide that has the data's classes
    untrained_distillation   control: trained on the logits of an untrained guide
    guide_itself             the guide, trained on the data (needs --train_guide)

Every field of TrainingArguments and GuidanceConfig is a flag and applies to all runs. Use --seeds instead of --seed,
and --max_steps instead of --num_train_epochs. Examples: --guidance_stop_step 300; --prealign_steps 100 --guide_input
prealign_noise; --guide_batch_norm batch. --output_dir contains a table, results.json, figures, and the model of each
run. Rerun the same command to resume. Results and their commands: recipes/README.md.
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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from hf_guidance import load_guide
from hf_guidance.experiments.arguments import INITIALISED, RecipeArguments
from hf_guidance.experiments.batch_norm import ReestimatedBatchNorm
from hf_guidance.experiments.command_line import check_choice
from hf_guidance.experiments.distillation import DistillationTrainer, check_classes
from hf_guidance.experiments.files import identify_folder
from hf_guidance.experiments.recipe import launch, training_defaults
from hf_guidance.experiments.recipe_runs import Setup
from hf_guidance.experiments.run import Run
from hf_guidance.guide.configs import is_resnet
from hf_guidance.guide.loading import untrained_network
from hf_guidance.targets.configuration_plain_resnet import DEPTHS
from hf_guidance.targets.vision import VISION_TARGETS, small_resnet, vision_target
from hf_guidance.tasks import Task, image_classification
from hf_guidance.tasks.image_decoding import AUGMENTATIONS, PixelFormat
from hf_guidance.tasks.images import check_last_batch, count_skipped
from hf_guidance.tasks.pixel_formats import check_sees, check_takes, pixel_format_of

RUNS = (
    *("alone", "alone_shifted", "guide_itself", "untrained_guide", "trained_guide", "trained_guide_cached"),
    *(f"{guide}_{end}" for guide in ("untrained_guide", "trained_guide") for end in INITIALISED),
    *("shuffled_guide", "noise_guide", "reversed_layers", "own_architecture"),
    *("distillation", "untrained_distillation"),
)
FROM_ITS_WEIGHTS = (
    *("trained_guide", "trained_guide_cached", *(f"trained_guide_{end}" for end in INITIALISED)),
    *("reversed_layers", "distillation"),
)
CACHED = {"measure": "debiased_cka", "sketch": 1024, "sample_id_column": "id"}
IMAGENET = "ILSVRC/imagenet-1k"
OTHER_SEED = 10_000  # of a guide that has the target's architecture, and must not have its weights
# flags that are options of the task of the same name
OF_THE_DATA = (
    *("dataset", "dataset_config", "streaming", "augmentation", "image_column", "label_column"),
    *("num_labels", "eval_size", "shuffle_buffer", "on_bad_image", "object_size"),
)

FAIR = """
    --dataset zalando-datasets/fashion_mnist --eval_size 2000 --lr_scheduler_type linear --train_guide
    --runs alone guide_itself trained_guide trained_guide_stopped --seeds 0 1 2 3 4 --equal_time_baseline --measure auto
    --disable_tqdm true
"""
DEEP_FCN = f"""{FAIR}
    --target deep_fcn --width 256 --dropout 0 --guide resnet18 --guide_width 16 --image_size 40 --object_size 28
    --train_size 2000 --per_device_train_batch_size 128 --max_steps 250 --eval_steps 50 --guide_learning_rate 1e-3
    --guide_max_steps 400 --guidance_weight 3 --batch_norm_rows 1000
"""
BESIDE_DEEP_FCN = f"{DEEP_FCN} --seeds 20 21 22 --learning_rate 5e-4 --equal_time_baseline false"
CONVNET = f"""{FAIR}
    --target resnet50_without_skips --width 16 --guide resnet50 --guide_width 16
    --guide_layers ResNetBottleNeckLayer --train_size 5000 --per_device_train_batch_size 64 --max_steps 400
    --guide_learning_rate 1e-3
"""
WIDE_FCN = f"""{FAIR}
    --target wide_fcn --width 512 --guide resnet18 --guide_width 16 --image_size 40 --object_size 28
    --train_size 2000 --per_device_train_batch_size 128 --max_steps 250 --eval_steps 50
    --guide_learning_rate 1e-3 --guide_max_steps 400 --guidance_weight 3 --batch_norm_rows 1000
"""
AT_THE_START = """
    --seeds 20 21 22 --equal_time_baseline false --stop_similarity 0.4
    --runs alone guide_itself trained_guide trained_guide_stopped trained_guide_decayed trained_guide_until_similar
    trained_guide_prealigned trained_guide_prealigned_on_noise
"""
WITH_CACHE = """
    --seeds 20 21 22 --runs alone guide_itself trained_guide trained_guide_cached --measure debiased_cka
    --equal_time_to trained_guide_cached
"""
CLAIMS = {
    "convnet_without_skips": f"""{CONVNET}
        --learning_rates 1e-3 2e-3 3e-3 6e-3 --seeds 10 11 12 13 14 --output_dir outputs/claims/convnet_without_skips
    """,
    "convnet_without_skips_cached": f"""{CONVNET} {WITH_CACHE}
        --learning_rate 2e-3 --output_dir outputs/claims/convnet_without_skips_cached
    """,
    "wide_fcn": f"""{WIDE_FCN}
        --learning_rates 3e-5 1e-4 3e-4 1e-3
        --seeds 10 11 12 13 14 --runs alone alone_shifted guide_itself trained_guide trained_guide_stopped
        --output_dir outputs/claims/wide_fcn
    """,
    "wide_fcn_cached": f"""{WIDE_FCN} {WITH_CACHE}
        --learning_rate 1e-4 --output_dir outputs/claims/wide_fcn_cached
    """,
    "deep_fcn": f"""{DEEP_FCN}
        --learning_rates 5e-4 1e-3 2e-3 4e-3 --seeds 10 11 12 13 14
        --runs alone alone_shifted guide_itself trained_guide trained_guide_stopped untrained_guide
        --output_dir outputs/claims/deep_fcn
    """,
    "deep_fcn_initialisation": f"""{DEEP_FCN} {AT_THE_START}
        --learning_rate 5e-4 --output_dir outputs/claims/deep_fcn_initialisation
    """,
    "wide_fcn_initialisation": f"""{WIDE_FCN} {AT_THE_START} --stop_similarity 0.5
        --learning_rate 1e-4 --output_dir outputs/claims/wide_fcn_initialisation
    """,
    "deep_fcn_cached": f"""{DEEP_FCN} {WITH_CACHE}
        --learning_rate 5e-4 --output_dir outputs/claims/deep_fcn_cached
    """,
    "deep_fcn_controls": f"""{BESIDE_DEEP_FCN}
        --runs alone guide_itself trained_guide untrained_guide own_architecture shuffled_guide noise_guide
        reversed_layers distillation untrained_distillation --output_dir outputs/claims/deep_fcn_controls
    """,
    "deep_fcn_measures": f"""{BESIDE_DEEP_FCN}
        --runs alone guide_itself trained_guide --measure linear_cka debiased_cka ridge ridge_loo procrustes
        --output_dir outputs/claims/deep_fcn_measures
    """,
}


@dataclass
class Arguments(RecipeArguments):
    """The flags: target, guide, runs and data."""

    target: str = field(default="deep_fcn", metadata={"help": f"One of {', '.join(VISION_TARGETS)}."})
    width: Optional[int] = field(
        default=None, metadata={"help": "Width of an FCN's blocks, or of a ResNet's stem, 64 in the paper."}
    )
    depth: Optional[int] = field(
        default=None, metadata={"help": "Number of an FCN's blocks; 18, 34 or 50 for a ResNet."}
    )
    image_size: Optional[int] = field(default=None, metadata={"help": "Image size of the target, in pixels."})
    dropout: Optional[float] = field(default=None, metadata={"help": "Dropout in an FCN's blocks."})
    guide: Optional[str] = field(
        default=None,
        metadata={"help": "timm/<name>, Hub id or folder; default the paper's ResNet with random weights."},
    )
    guide_width: Optional[int] = field(
        default=None,
        metadata={"help": "Width of the stem of a guide that is built from its name: resnet18, resnet34 or resnet50."},
    )
    untrained_guide: bool = field(default=False, metadata={"help": "Use random weights for --guide, not its own."})
    train_guide: bool = field(default=False, metadata={"help": "First train the guide on the same data, and save it."})
    guide_image_size: Optional[int] = field(
        default=None,
        metadata={"help": "Image size of the guide; default the one it was trained on or made for, else the target's."},
    )
    runs: Optional[list[str]] = field(
        default=None, metadata={"help": f"Some of {', '.join(RUNS)}; default alone and the runs of the chosen guide."}
    )
    dataset: str = field(default="digits", metadata={"help": "Hub id or local folder; digits is scikit-learn's."})
    dataset_config: Optional[str] = field(default=None, metadata={"help": "Configuration of the dataset."})
    image_column: Optional[str] = field(
        default=None, metadata={"help": "Name of the column with images; found by default."}
    )
    label_column: Optional[str] = field(
        default=None, metadata={"help": "Name of the column with classes; found by default."}
    )
    num_labels: Optional[int] = field(
        default=None, metadata={"help": "Number of classes, if the dataset does not name them."}
    )
    streaming: Optional[bool] = field(
        default=None, metadata={"help": "Stream the training data; default for ImageNet only."}
    )
    train_size: Optional[int] = field(default=None, metadata={"help": "Number of training rows; default all."})
    shuffle_buffer: int = field(default=2000, metadata={"help": "Images in the shuffle buffer of a stream."})
    augmentation: Optional[str] = field(default=None, metadata={"help": f"One of {', '.join(AUGMENTATIONS)}."})
    object_size: Optional[int] = field(
        default=None, metadata={"help": "Size of each image on a black canvas of --image_size, at a place of its own."}
    )
    batch_norm_rows: Optional[int] = field(
        default=None,
        metadata={"help": "Estimate batch norm's statistics on so many training rows before each evaluation."},
    )
    on_bad_image: str = field(
        default="raise", metadata={"help": "raise, or skip and count images that cannot be decoded."}
    )

    def __post_init__(self) -> None:
        for name, value, possible in (
            ("preset", self.preset, ("small", "paper")),
            ("target", self.target, VISION_TARGETS),
            *(("runs", run, RUNS) for run in self.runs or ()),
        ):
            check_choice(name, value, possible)
        for name in (
            "width",
            "depth",
            "image_size",
            "guide_image_size",
            "guide_width",
            "object_size",
            "shuffle_buffer",
            "batch_norm_rows",
        ):
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
            raise ValueError(
                f"--train_guide trains an architecture from random weights, but --guide {self.guide} is a folder."
            )
        if not self.train_guide and "guide_itself" in self.runs:
            raise ValueError("--runs guide_itself trains the guide on the data: add --train_guide.")
        needing = [run for run in self.runs if run in FROM_ITS_WEIGHTS]
        if needing and not self.train_guide and (self.untrained_guide or not self.guide_is_named):
            raise ValueError(
                f"--runs {needing[0]} needs a trained guide: name one with --guide and leave --untrained_guide out, "
                "or add --train_guide."
            )
        if self.target == "resnet50_without_skips" and self.dropout is not None:
            raise ValueError("--dropout applies to the FCNs only.")
        if self.batch_norm_rows is not None and self.streaming:
            raise ValueError("--batch_norm_rows needs training rows that are read by number, but --streaming reads on.")
        if self.guide_width is not None:
            named = [f"resnet{depth}" for depth in DEPTHS]
            if self.guide not in named:
                given = f"--guide is {self.guide}" if self.guide_is_named else "--guide is not given"
                raise ValueError(f"--guide_width needs --guide {' or '.join(named)}, which it builds; {given}.")

    def _runs_of_the_guide(self) -> list[str]:
        if self.train_guide:
            return ["alone", "guide_itself", "untrained_guide", "trained_guide"]
        return ["alone", "trained_guide" if self.guide_is_named and not self.untrained_guide else "untrained_guide"]


def target_of(recipe: Arguments, task: Task) -> PreTrainedModel:
    """Build the target with random weights."""
    names = {"label2id": {name: i for i, name in enumerate(task.labels)}, "id2label": dict(enumerate(task.labels))}
    small = recipe.preset == "small"
    deep = recipe.target == "deep_fcn"
    return vision_target(
        recipe.target,
        int(recipe.image_size or 0),
        width=recipe.width
        or (None if not small or recipe.target == "resnet50_without_skips" else 256 if deep else 1024),
        depth=recipe.depth or (49 if small and deep else None),
        dropout=recipe.dropout if recipe.dropout is not None else (0.1 if deep else 0.0),
        **names,
    )


def defaults(recipe: Arguments) -> dict[str, Any]:
    """Return the defaults of the other flags."""
    small = recipe.preset == "small"
    batch = 128 if small and recipe.dataset == "digits" else 256  # digits should finish in minutes on two cores
    values = training_defaults(300 if small else 100_000, batch, 1e-3)
    name = Path(recipe.dataset).name
    values["output_dir"] = f"outputs/fcn_vs_resnet/{recipe.target}-{name}-{recipe.preset}"
    values["remove_unused_columns"] = False  # the rows still hold images
    if recipe.streaming:
        values["accelerator_config"] = {"dispatch_batches": False}  # else rank 0 decodes for all ranks
    values["measure"] = "auto" if small else "linear_cka"  # the paper's
    if recipe.guide_width is not None or is_resnet(str(recipe.guide)):
        values["guide_layers"] = ["Conv2d"]  # every convolution, as in the paper
    return values


def build(recipe: Arguments, args: TrainingArguments) -> Setup:
    """Build data and runs from the flags."""
    guide: Any = str(recipe.guide)
    size = int(recipe.image_size or 0)
    if recipe.guide_width is not None:
        guide = small_resnet(guide, recipe.guide_width)
    chosen = set(recipe.runs or ())
    trained = not recipe.train_guide and bool({*FROM_ITS_WEIGHTS} & chosen)
    head = AutoModelForImageClassification if "distillation" in chosen else None
    network = load_guide(guide, untrained=not trained, auto_class=head)
    check_sees(network, str(recipe.guide))
    own = PixelFormat(recipe.guide_image_size or size)
    if recipe.guide_width is None:
        own = pixel_format_of(guide, size, trained=trained, given=recipe.guide_image_size)
    check_takes(network, own, str(recipe.guide))
    options: dict[str, Any] = {name: getattr(recipe, name) for name in OF_THE_DATA}
    if recipe.train_size is not None:
        options["train_size"] = recipe.train_size
    pixels = PixelFormat(size, own.mean, own.std)
    load = partial(image_classification, **options)
    task = load(target=pixels, guide=own)
    if "distillation" in chosen and not recipe.train_guide:
        check_classes(str(recipe.guide), task.labels)
    alike = {"alone": task, "itself": load(target=own) if recipe.train_guide and own != pixels else task}
    if "alone_shifted" in chosen:
        alike["shifted"] = image_classification(**options | {"augmentation": "shift"}, target=pixels)
    if "own_architecture" in chosen and own != pixels:
        alike["own_architecture"] = load(target=pixels)
    data = {**options, "guide_source": Path(str(recipe.guide)).name}
    for name in ("guide_width", "batch_norm_rows"):
        if getattr(recipe, name) is not None:
            data[name] = getattr(recipe, name)
    if os.path.isdir(recipe.dataset):
        data["dataset"] = {"name": Path(recipe.dataset).resolve().name, "files": identify_folder(recipe.dataset)}
    if recipe.streaming:
        data["workers"] = args.dataloader_num_workers  # workers share the files, so their number changes the order
    if not args.dataloader_drop_last:
        check_last_batch(task, args.train_batch_size)
    return Setup(
        task=task,
        data={"task": task.name, **data, "target": vars(pixels), "guide": vars(own)},
        target=partial(target_of, recipe, task),
        runs=partial(matched_runs, recipe, args, alike, guide),
        train_dataset=lambda seed: task.train_dataset.with_seed(seed),
        callbacks=partial(batch_norm_callbacks, recipe.batch_norm_rows, args.per_device_eval_batch_size),
        summary=partial(count_skipped, task),
    )


def batch_norm_callbacks(rows: int | None, batch: int, task: Task) -> list[TrainerCallback]:
    """Return the callback that estimates batch norm's statistics on the first `rows` training rows; none for None."""
    if rows is None:
        return []
    first = [task.train_dataset[i] for i in range(min(rows, len(task.train_dataset)))]
    return [ReestimatedBatchNorm([task.data_collator(first[i : i + batch]) for i in range(0, len(first), batch)])]


def matched_runs(
    recipe: Arguments, args: TrainingArguments, tasks: dict[str, Task], source: Any, seed: int
) -> list[Run]:
    """Return the runs of one seed, in an order that trains the guide before it is needed."""
    labels = len(tasks["alone"].labels)
    target = partial(target_of, recipe, tasks["alone"])
    trained = Path(str(args.output_dir)) / f"seed-{seed}" / "guide_itself"
    cached = CACHED | {"cache_guide": str(Path(str(args.output_dir)) / "cache")}
    untrained: Callable[[], Any] = partial(load_guide, source, untrained=True, seed=seed)
    given: Callable[..., Any] = partial(load_guide, trained if recipe.train_guide else source)

    def distil(teacher: Callable[[], Any], **kwargs: Any) -> DistillationTrainer:
        return DistillationTrainer(guide=teacher(), **kwargs)

    def own_architecture() -> Any:
        return load_guide(target().config, untrained=True, seed=OTHER_SEED + seed)

    needs = "guide_itself" if recipe.train_guide else None
    own_task = replace(tasks["itself"], train_dataset=tasks["itself"].train_dataset.with_seed(seed))
    others = {
        name: replace(other, train_dataset=other.train_dataset.with_seed(seed))
        for name, other in tasks.items()
        if name in ("shifted", "own_architecture")
    }
    itself = partial(untrained_network, source, AutoModelForImageClassification, num_labels=labels)
    runs = [
        Run("alone", seed, target),
        Run("alone_shifted", seed, target, task=others.get("shifted")),
        Run("guide_itself", seed, itself, training=recipe.guide_training(), task=own_task),
        Run("untrained_guide", seed, target, guide=untrained),
        Run("trained_guide", seed, target, guide=given, needs=needs, like=untrained),
        Run("trained_guide_cached", seed, target, guide=given, needs=needs, like=untrained, guidance=cached),
        Run("shuffled_guide", seed, target, guide=untrained, guidance={"guide_input": "shuffled"}),
        Run("noise_guide", seed, target, guide=untrained, guidance={"guide_input": "noise"}),
        Run(
            "reversed_layers",
            seed,
            target,
            guide=given,
            needs=needs,
            like=untrained,
            guidance={"layer_mapping": "reversed"},
        ),
        Run(
            "own_architecture",
            seed,
            target,
            guide=own_architecture,
            guidance={"guide_layers": ["hidden_states"]},
            task=others.get("own_architecture"),
        ),
        Run(
            "distillation",
            seed,
            target,
            trainer=partial(distil, partial(given, auto_class=AutoModelForImageClassification)),
        ),
        Run("untrained_distillation", seed, target, trainer=partial(distil, itself)),
    ]
    by_name = {run.name: run for run in runs}
    runs += [
        replace(by_name[name], name=f"{name}{end}", guidance=fields)
        for name in ("untrained_guide", "trained_guide")
        for end, fields in recipe.initialisations(recipe.runs or (), args.max_steps).items()
    ]
    chosen = set(recipe.runs or ())
    if recipe.train_guide and chosen & {*FROM_ITS_WEIGHTS}:
        chosen.add("guide_itself")
    return [run for run in runs if run.name in chosen]


if __name__ == "__main__":
    launch(__doc__ or "", Arguments, defaults, build, CLAIMS)
