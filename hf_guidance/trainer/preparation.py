"""Preparation of the guide before training: its batch norm and cache, on the first rows of the data, and its copy."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file, save_model

from hf_guidance.card.facts import Rows
from hf_guidance.guide.cache import row_checksums
from hf_guidance.guide.forward import generator_for, guide_batch, seen_by
from hf_guidance.guide.freezing import calibrate_batch_norm
from hf_guidance.guide.identity import fingerprint
from hf_guidance.guide.random_state import kept_random_state
from hf_guidance.guide.sharding import is_sharded, whole_state
from hf_guidance.trainer.protocol import GuidedTrainer


def calibrate(trainer: GuidedTrainer) -> None:
    """Estimate the guide's batch norm on the first training batches, the same on every rank and resume.

    Raises:
        ValueError: If the training data have fewer batches than `calibration_batches`.
    """
    seen, count = 0, trainer.guidance.calibration_batches
    loss = trainer.guidance_loss  # made before, because it puts the guide in evaluation mode

    def forwards() -> Iterator[Any]:
        nonlocal seen
        for batch in islice(first_batches(trainer, trainer.train_dataset), count):
            with trainer.accelerator.autocast():
                yield lambda batch=batch: loss.forward_guide(
                    guide_batch(batch, trainer.model, trainer.guidance_loss.guide)
                )
            seen += 1

    calibrate_batch_norm(trainer.guide, forwards())
    if seen < count:
        raise ValueError(f"calibration_batches is {count}, but the training data has {seen} full batches.")


def open_cache(trainer: GuidedTrainer) -> None:
    """Open or create the cache of the guide's features, and print how large it will be.

    Raises:
        ValueError: If samples have no ids, or inputs change between epochs; also whatever `GuideCache` raises.
    """
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError("cache_guide needs a dataset with a length and numbered samples; this one is a stream.")
    first, again = (next(first_batches(trainer, trainer.train_dataset, reading), None) for reading in range(2))
    if first is None or again is None:
        raise ValueError(
            f"cache_guide: the training data has {len(trainer.train_dataset)} rows, fewer than one batch of "
            f"{trainer.args.per_device_train_batch_size}."
        )
    inputs = (guide_batch(batch, trainer.model, trainer.guidance_loss.guide) for batch in (first, again))
    once, twice = (row_checksums(seen_by(trainer.guide, each)) for each in inputs)
    if (once != twice).any():
        raise ValueError(
            "cache_guide needs inputs that are the same in every epoch, but the first rows differ when they are read "
            "twice. Leave out augmentation or cache_guide."
        )
    said = trainer.guidance_loss.running.cache is not None  # an earlier `train` opened it
    who = {"architecture": type(trainer.guide).__name__, "fingerprint": fingerprint(trainer.guide)}  # as calibrated
    with trainer.args.main_process_first(local=False):
        create = trainer.is_world_process_zero()
        trainer.guidance_loss.open_cache(trainer._prepare_inputs(first), len(trainer.train_dataset), who, create)
    if trainer.is_world_process_zero() and not said:
        print(f"The guide's features will take {trainer.guidance_loss.running.cache}.")


def first_batches(
    trainer: GuidedTrainer, dataset: Rows, reading: int = 0, size: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield batches of a dataset in order, as training would collate them, without changing any random state.

    Random augmentation follows the seed of the run and `reading`. A batch has `size` rows, or as many as in training.
    """
    from torch.utils.data import DataLoader

    collator = _without_its_state(trainer.data_collator)
    if getattr(dataset, "column_names", None):
        with suppress(ValueError):  # no column is an argument: the Trainer's own loader, as of texts, removes none
            dataset = trainer._remove_unused_columns(dataset)
    else:
        collator = trainer._get_collator_with_removed_columns(collator)
    size = size or trainer.args.per_device_train_batch_size
    loader = DataLoader(dataset, size, shuffle=False, collate_fn=collator, drop_last=True)
    with _randomness_of_its_own(generator_for(trainer.args.seed, 3 + reading).initial_seed()):
        yield from loader


def _without_its_state(collator: Any) -> Any:
    """Copy a collator with its counters and generators, so that using the copy does not change the original."""
    fresh = copy.copy(collator)
    for name, value in getattr(fresh, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            setattr(fresh, name, value.clone_state())
        elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState, dict, list, set)):
            setattr(fresh, name, copy.deepcopy(value))
    return fresh


@contextmanager
def _randomness_of_its_own(seed: int) -> Iterator[None]:
    """Seed torch, Python and numpy inside the context, and restore their random states after it."""
    with kept_random_state():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def save_guide(trainer: GuidedTrainer, folder: Path) -> None:
    """Save the guide's weights. All processes must call this; one writes."""
    guide = trainer.guide
    state = whole_state(guide) if is_sharded(guide) else None  # a collective call of all ranks
    if not trainer.args.should_save:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(guide, "save_pretrained"):
        guide.save_pretrained(folder, state_dict=state)
    elif state is not None:
        save_file(state, str(folder / "model.safetensors"))
    else:
        save_model(guide, str(folder / "model.safetensors"))
