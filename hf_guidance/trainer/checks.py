"""Checks at the start: settings that accelerate or Trainer would ignore silently, or that guidance cannot work with."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import str_to_bool
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_guidance.config import GuidanceConfig
from hf_guidance.features.batch import is_packed
from hf_guidance.features.distributed import ranks_of
from hf_guidance.features.samples import Samples
from hf_guidance.guide.freezing import check_not_wrapped
from hf_guidance.guide.inputs import check_vocabularies
from hf_guidance.guide.own_base import OwnBase
from hf_guidance.schedule import check_warmup
from hf_guidance.similarity.registry import min_samples
from hf_guidance.trainer.accumulation import check_accumulates
from hf_guidance.trainer.forwards import check_watches_each, watches_each
from hf_guidance.trainer.preparation import first_batches
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.stepping_backward import check_may_skip, what_steps_backward

logger = logging.getLogger(__name__)


def check_machine(args: TrainingArguments) -> None:
    """Check that the machine gives the run what it asks for.

    fp16 without a GPU gives a warning, because Trainer then runs float32.

    Args:
        args: `TrainingArguments`.

    Raises:
        ValueError: If FSDP is set without a GPU, where Trainer would run plain DDP, or if several processes do not
            form a group, so that each would train alone.
    """
    if args.device.type != "cpu":
        return
    if args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        raise ValueError(
            "FSDP was asked for, but this run is on the CPU, where Trainer would run plain DDP and shard nothing. "
            "Launch without FSDP, or use a machine with GPUs."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started, but this one trains in a world of {args.world_size}. Without a GPU and "
            "without use_cpu=True the processes do not form a group, and each would train alone. Set use_cpu=True."
        )
    if args.fp16:
        logger.warning("fp16 was asked for, but on the CPU Trainer runs float32. Use bf16 for half precision here.")


def check_writable(folder: str | os.PathLike[str], name: str = "output_dir") -> None:
    """Raise ValueError before any work if a folder for results can be neither written nor made.

    Args:
        folder: The folder. It is not made yet.
        name: The setting that names it.
    """
    path = Path(folder).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(place for place in (path, *path.parents) if place.exists())):
            pass
    except OSError as error:
        raise ValueError(f"{name} {folder} cannot be written ({error.strerror}): name another folder.") from error


def check_is_arguments(args: object) -> None:
    """Raise ValueError unless a Trainer's `args` are `TrainingArguments`, or None."""
    if args is None or isinstance(args, TrainingArguments):
        return
    where = " Settings of guidance belong in guidance=." if isinstance(args, GuidanceConfig) else ""
    raise ValueError(
        f"args is a {type(args).__name__}; expected TrainingArguments, such as TrainingArguments('outputs').{where}"
    )


def check_output(args: TrainingArguments) -> None:
    """Raise ValueError if a run could not write what it is to save. One that saves nothing may have such a folder."""
    folder = str(args.output_dir)
    if args.should_save and not (args.save_strategy == "no" and os.path.isdir(folder)):
        check_writable(folder)


def check_trainer(trainer: GuidedTrainer) -> None:
    """Raise ValueError if guidance would not do what its settings say in this trainer."""
    deepspeed, config = trainer.is_deepspeed_enabled, trainer.guidance
    check_not_wrapped(trainer.model, "target")
    is_default, made = _is_default(trainer.data_collator), makes_batches(trainer)
    if made:
        check_takes_batches(type(trainer).__name__, config)
    sharded = deepspeed or trainer.is_fsdp_enabled
    samples = None if is_default or made else partial(samples_of_first_batch, trainer)
    check_settings(trainer.args, config, deepspeed=deepspeed, sharded=sharded, samples=samples)
    check_has_rows(trainer)
    if watches_each(trainer):
        check_watches_each(trainer)
    if isinstance(trainer.guide, OwnBase):
        trainer.guide.check(config)
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "guide='base' runs the target's own weights outside its training step, but FSDP and DeepSpeed ZeRO-3 "
                "shard them. Use DDP or ZeRO-2, or pass a copy of the base (load_guide) as the guide."
            )
    if is_default and not config.guide_shares_tokenizer:
        columns = getattr(trainer.train_dataset, "column_names", None)
        if columns:
            check_vocabularies(trainer.model, trainer.guide, columns)


def check_has_rows(trainer: GuidedTrainer) -> None:
    """Raise ValueError if the whole training data have fewer rows than the guide is to run on."""
    rows, data = trainer.guidance.guide_rows, trainer.train_dataset
    if rows is None or not hasattr(data, "__len__") or len(data) >= rows or makes_batches(trainer):
        return
    count = samples_of_first_batch(trainer, len(data))
    if count is not None and rows > count:
        raise ValueError(
            f"guide_rows is {rows}, but the training data have {count} rows: lower it, or leave it out to run the "
            "guide on all rows."
        )


def check_takes_batches(name: str, config: GuidanceConfig) -> None:
    """Raise ValueError for settings that need batches ahead of a step, which a Trainer makes only in it.

    Args:
        name: Name of the Trainer.
        config: Settings of the guidance.
    """
    needs = {
        "similarity_batch='accumulated'": config.similarity_batch == "accumulated",
        "sample_axis='within'": config.sample_axis == "within",
        "guide_input='prealign_noise'": config.guide_input == "prealign_noise",
        "guide_batch_norm='calibrated'": config.guide_batch_norm == "calibrated",
        f"cache_guide={config.cache_guide!r}": config.cache_guide is not None,
        "eval_similarity=True": config.eval_similarity,
    }
    if found := [setting for setting, is_set in needs.items() if is_set]:
        raise ValueError(
            f"{name} makes its batches itself, in each step, as one that generates does; {' and '.join(found)} needs "
            "them as the data collator returns them: leave it out."
        )


def check_settings(
    args: TrainingArguments,
    config: GuidanceConfig,
    *,
    deepspeed: bool = False,
    sharded: bool = False,
    samples: Callable[[], int | None] | None = None,
) -> None:
    """Raise ValueError if guidance would not do what its settings say.

    Args:
        args: `TrainingArguments`.
        config: Settings of the guidance.
        deepspeed: Whether DeepSpeed takes the optimizer steps.
        sharded: Whether the weights of the target are sharded over the processes.
        samples: Counts the samples in a batch of `per_device_train_batch_size` examples, or returns None if that is
            unknown. It is called if one sample for each example would be too few.
    """
    check_machine(args)
    if config.on_non_finite == "skip" and deepspeed:
        raise ValueError(
            "on_non_finite='skip' does not work with DeepSpeed, which takes its step at the end of the backward pass. "
            "Use on_non_finite='stop'."
        )
    check_may_skip(config.on_non_finite == "skip", what_steps_backward(args.optim))
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) would split the batch that the similarity is computed "
            "over. Use `accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size changes the batch size, and a similarity depends on it. Set "
            "per_device_train_batch_size, and gradient_accumulation_steps if memory is short."
        )
    best = args.metric_for_best_model or ""
    if best.removeprefix("eval_").startswith("guidance/") and not config.eval_similarity:
        raise ValueError(
            f"metric_for_best_model is {best!r}, but similarities are measured on validation data only with "
            "eval_similarity=True: set it, or choose another metric."
        )
    if config.guidance_weight and args.max_steps > 0:
        check_warmup(config.guidance_warmup_steps, config.prealign_steps, config.guidance_stop_step, args.max_steps)
    if config.similarity_batch == "accumulated":
        check_accumulates(args, sharded=sharded)
    ranks_of(config.similarity_batch)  # raises an error that names what is missing
    times = {"global": args.world_size, "accumulated": args.gradient_accumulation_steps}
    rows = rows_of_a_process(args) * times.get(config.similarity_batch, 1)
    needed, made = min_samples(config.measure) if config.sample_axis == "sequence" else 1, ""
    if samples is not None and rows < max(needed, config.guide_rows or 0):
        count = samples()
        if count is None:  # the first step will tell
            return
        rows = rows * count // args.per_device_train_batch_size
        made = f", of which the data collator makes {count} samples"
    if config.guide_rows is not None and config.guide_rows > rows:
        raise ValueError(
            f"guide_rows is {config.guide_rows}, but a batch has {rows} rows: lower it, or leave it out to run the "
            "guide on all rows."
        )
    if rows < needed:
        split = f", split over {args.world_size} processes" if splits_batches(args) else ""
        raise ValueError(
            f"per_device_train_batch_size is {args.per_device_train_batch_size}{made}{split}, but {config.measure} "
            f"needs at least {needed} samples a batch. Gradient accumulation adds some only with "
            "similarity_batch='accumulated'."
        )


def samples_of_first_batch(trainer: GuidedTrainer, size: int | None = None) -> int | None:
    """Count the samples that the data collator makes of the first `size` examples, as many as in a batch if None.

    Returns None if that is unknown.

    A collator of pairs makes two rows of each. The number of packed documents differs between batches, and a stream is
    not read, because it may not start again.
    """
    rows = trainer.train_dataset
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        return None
    batch = next(first_batches(trainer, rows, size=size), None)
    return None if not isinstance(batch, Mapping) or is_packed(batch) else Samples(batch).count


def rows_of_a_process(args: TrainingArguments) -> int:
    """Compute how many rows of a batch one process has: its share, if accelerate's `split_batches` is set.

    Raises:
        ValueError: If the batch cannot be split evenly.
    """
    if not splits_batches(args):
        return args.per_device_train_batch_size
    rows, left = divmod(args.per_device_train_batch_size, args.world_size)
    if left:
        raise ValueError(
            f"split_batches gives each of the {args.world_size} processes its part of a batch, but "
            f"per_device_train_batch_size is {args.per_device_train_batch_size}: choose a multiple of "
            f"{args.world_size}, or set split_batches=False."
        )
    return rows


def splits_batches(args: TrainingArguments) -> bool:
    """Tell whether processes share one batch, instead of each having its own."""
    return bool(getattr(args.accelerator_config, "split_batches", False)) and args.world_size > 1


def makes_batches(trainer: Any) -> bool:
    """Tell whether a Trainer makes its batches in the step, of the rows that its collator returns."""
    return type(trainer)._prepare_inputs is not Trainer._prepare_inputs


def _is_default(collator: Any) -> bool:
    """Tell whether the collator is transformers' own, which cannot add `guide_*` columns."""
    modules = type(collator).__module__, getattr(collator, "__module__", "")
    return any(module.startswith("transformers.") for module in modules)
