"""Going on after a stop: only from a checkpoint that is whole, and only with what the run began with."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_guidance.config import CONFIG_NAME, GuidanceConfig, Json
from hf_guidance.guide.identity import check_same_guide
from hf_guidance.trainer.checks import splits_batches
from hf_guidance.trainer.guided_steps import GuidedSteps

if TYPE_CHECKING:
    Behind = Trainer
else:
    Behind = object

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # written last, when every rank has written its part
ORIGIN = "rng_state.json"  # what randomness and data order follow from, beside the saved random states
ZIPPED = ("*.pt", "*.pth", "optimizer.bin", "pytorch_model*.bin")  # torch.save; a zip's directory is at its end
WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*", "global_step*")
OPTIMIZER = ("optimizer*", "global_step*")
GUIDED_STEPS = "guided_steps"  # of the same file
HARMLESS = {"log_measures", "save_guide", "on_non_finite", "guide_shares_tokenizer", "cache_guide", "sample_id_column"}
HARMLESS |= {"shard_guide"}
FATAL = {"seed", "data_seed", "max_steps"}  # the last where a decay ends with the run
BATCH = {"per_device_train_batch_size", "world_size", "gradient_accumulation_steps", "split_batches"}


# ---------------------------------------------------------------------------------------------------- whole or torn


def fault_of(checkpoint: str | Path) -> str | None:
    """What keeps a checkpoint from being gone on with, in words; None if it is whole.

    A process can be killed between any two writes, so a file may be missing or cut off. Trainer writes the weights,
    the optimizer, the scheduler, the random states and then its own state; only this last one can be relied on to
    come after the others (`ResumingMixin` sees to the other ranks).
    """
    place = Path(checkpoint)
    if not place.is_dir():
        return "there is no such folder"
    try:
        json.loads((place / STATE).read_text(encoding="utf-8"))
    except OSError:
        return f"it has no {STATE}, which is written last"
    except ValueError:
        return f"its {STATE} is cut off"
    for path in sorted(place.glob("*.safetensors")):
        if not _opens(path):
            return f"its {path.name} is cut off"
    for path in (p for pattern in ZIPPED for p in sorted(place.glob(pattern))):
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"its {path.name} is cut off"
    return _what_is_missing(place)


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # compares the length of the file with its header
            return True
    except (SafetensorError, OSError):
        return False


def _what_is_missing(place: Path) -> str | None:
    if not any(any(place.glob(pattern)) for pattern in WEIGHTS):
        return "it has no weights"
    if not any(any(place.glob(pattern)) for pattern in OPTIMIZER):
        return "it has no optimizer state (save_only_model?)"
    origin = _origin_of(place)
    ranks = origin.get("world_size", 1)
    needed = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]
    if not origin and any(place.glob("rng_state_*.pth")):  # plain Trainer's, of several processes
        needed = []
    if origin.get("guided"):
        needed.append(CONFIG_NAME)
    if not any(place.glob("global_step*")):  # DeepSpeed keeps it with the rest
        needed.append("scheduler.pt")
    for name in needed:
        if not (place / name).is_file():
            return f"it has no {name}"
    return None


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The latest checkpoint in a run's folder that is whole; None if there is none."""
    whole = (path for path in _checkpoints(folder) if fault_of(path) is None)
    return next(map(str, whole), None)


def _checkpoints(folder: str | Path) -> list[Path]:
    """Latest first."""
    found = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def checkpoint_to_resume(asked: str | bool | None, folder: str | Path) -> str | None:
    """The checkpoint that `Trainer.train(resume_from_checkpoint=asked)` is to go on from.

    Raises:
        ValueError: the one that is named, or with True every one in the folder, is not whole.
    """
    if not asked:
        return None
    if asked is not True:
        if fault := fault_of(asked):
            raise ValueError(
                f"Cannot go on from {asked}: {fault}. resume_from_checkpoint=True takes the last whole checkpoint; "
                "weights alone are for from_pretrained."
            )
        return str(asked)
    if whole := last_whole_checkpoint(folder):
        return whole
    faults = [f"{path.name}: {fault_of(path)}" for path in _checkpoints(folder)]
    found = f"; found {'; '.join(faults)}" if faults else ""
    raise ValueError(f"There is no whole checkpoint in {folder} to go on from{found}. Start without resuming.")


# ------------------------------------------------------------------------------------------ what the run began with


def _origin_of(place: Path) -> dict[str, Any]:
    try:
        return json.loads((place / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of an earlier version, or of plain Trainer
        return {}


def guided_steps_of(checkpoint: str | Path | None) -> int | None:
    """How many steps of a run were guided up to a checkpoint; 0 without one, None if an earlier version wrote it."""
    return 0 if checkpoint is None else _origin_of(Path(checkpoint)).get(GUIDED_STEPS)


def _origin(args: TrainingArguments, steps: int, guided: bool) -> dict[str, Any]:
    names = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed")
    return {name: getattr(args, name) for name in names} | {
        "split_batches": splits_batches(args),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "max_steps": steps,
        "guided": guided,
    }


def _samples(origin: dict[str, Any], config: GuidanceConfig) -> int | None:
    """How many rows a similarity was taken over; None where it is not known."""
    rows = origin.get("per_device_train_batch_size")
    if rows and origin.get("split_batches"):
        rows //= origin.get("world_size", 1)
    times = {"global": "world_size", "accumulated": "gradient_accumulation_steps"}.get(config.similarity_batch)
    return rows and rows * (origin.get(times, 1) if times else 1)


def check_goes_on(
    checkpoint: str, args: TrainingArguments, config: GuidanceConfig, guide: Mapping[str, Json] | None
) -> None:
    """Compare a run with the checkpoint it is to go on from.

    Args:
        guide: identity of the present guide, if there is one.

    Raises:
        ValueError: another guide, or a setting that changes what is trained, named with both values.

    Warns of what the run can go on with, though not to the weights of an unbroken one.
    """
    place = Path(checkpoint)
    if guide is None:
        if (place / CONFIG_NAME).is_file():
            logger.warning("%s was trained with guidance; from here on there is none.", place.name)
        return
    if not (place / CONFIG_NAME).is_file():
        logger.warning("%s was trained without guidance; from here on there is guidance.", place.name)
        return
    then, guide_then = GuidanceConfig.load(place)
    check_same_guide(guide, guide_then, place.name)
    changed = _changes(then.without_paths(), config.without_paths())
    began, now = _origin_of(place), _origin(args, args.max_steps, True)
    decays = config.guidance_schedule != "constant" and config.guidance_stop_step is None
    if args.max_steps < 1 or not decays:  # the length is not known yet, or the schedule does not depend on it
        began.pop("max_steps", None)
    origin = _changes(began, now)
    fatal = {name: words for name, words in changed.items() if name not in HARMLESS}
    other_batch = _samples(began, then) not in (None, _samples(now, config))
    fatal |= {name: words for name, words in origin.items() if name in FATAL | (BATCH if other_batch else set())}
    if fatal:
        raise ValueError(
            f"{place.name} was trained with other settings: {', '.join(fatal.values())}. Resuming would train towards "
            "something else: give the same settings, or start a new run from its weights (from_pretrained)."
        )
    if changed:
        logger.warning("Going on from %s with other settings: %s.", place.name, ", ".join(changed.values()))
    if origin:
        logger.warning(
            "Going on from %s with other settings: %s. Data order, randomness or rounding will not be those of an "
            "unbroken run.",
            place.name,
            ", ".join(origin.values()),
        )


def _changes(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Name → ``name was 1, is 2``, for the names that both have."""
    return {k: f"{k} was {then[k]!r}, is {now[k]!r}" for k in then if k in now and then[k] != now[k]}


class ResumingMixin(Behind):
    """The part of `GuidanceMixin` that makes `trainer_state.json` the last word on a checkpoint."""

    guide: Any
    _guided: GuidedSteps

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # one that lies there from an earlier run must not vouch for what is written now
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            origin = _origin(self.args, self.state.max_steps, self.guide is not None)
            origin[GUIDED_STEPS] = self._guided.total() if self.guide is not None else 0
            text = json.dumps(origin, indent=2) + "\n"
            (Path(output_dir) / ORIGIN).write_text(text, encoding="utf-8")
        self.accelerator.wait_for_everyone()  # Trainer does not: rank 0 would be done before the others
