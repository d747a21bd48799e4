"""Resuming: only from a complete checkpoint, and only with the settings and the guide that the run began with."""

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
from hf_guidance.trainer.steps import GuidedSteps

if TYPE_CHECKING:
    Behind = Trainer
else:
    Behind = object

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # written last, after every rank has written its part
ORIGIN = "rng_state.json"  # settings that decide randomness and data order, beside the random states
ZIPPED = ("*.pt", "*.pth", "optimizer.bin", "pytorch_model*.bin")  # zip files; their directory is at the end
WEIGHTS = ("*.safetensors", "*/*.safetensors", "pytorch_model*", "global_step*")
OPTIMIZER = ("optimizer*", "global_step*")
RESUMED = (*OPTIMIZER, "scheduler*", "rng_state*")  # none of which save_only_model writes
GUIDED_STEPS = "guided_steps"  # key in the same file
PASS, PASS_BEGAN = "pass", "pass_began"  # likewise, of a stream
HARMLESS = {"log_measures", "save_guide", "on_non_finite", "guide_shares_tokenizer", "cache_guide", "sample_id_column"}
HARMLESS |= {"shard_guide", "eval_similarity", "log_gradients"}
FATAL = {"seed", "data_seed", "max_steps"}  # max_steps only where the decay ends with the run
BATCH = {"per_device_train_batch_size", "world_size", "gradient_accumulation_steps", "split_batches"}


# ------------------------------------------------------------------------------------------- complete or incomplete


def fault_of(checkpoint: str | Path, weights_suffice: bool = False) -> str | None:
    """Explain why a checkpoint cannot be resumed from; return None if it is complete.

    A process can be killed between any two writes, so a file may be missing or cut off. Trainer writes weights,
    optimizer, scheduler, random states, and last its own state. `ResumingMixin` makes sure that the state comes after
    the files of all ranks.

    Args:
        checkpoint: Folder of the checkpoint.
        weights_suffice: Whether weights alone are complete, as `save_only_model` writes them.
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
    return _what_is_missing(place, weights_suffice)


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # compares the length of the file with its header
            return True
    except (SafetensorError, OSError):
        return False


def _what_is_missing(place: Path, weights_suffice: bool) -> str | None:
    if not any(any(place.glob(pattern)) for pattern in WEIGHTS):
        return "it has no weights"
    if weights_suffice and not any(any(place.glob(pattern)) for pattern in RESUMED):
        return None
    if not any(any(place.glob(pattern)) for pattern in OPTIMIZER):
        return "it has no optimizer state (save_only_model?)"
    origin = origin_of(place)
    ranks = origin.get("world_size", 1)
    needed = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]
    if not origin and any(place.glob("rng_state_*.pth")):  # written by plain Trainer with several processes
        needed = []
    if origin.get("guided"):
        needed.append(CONFIG_NAME)
    if not any(place.glob("global_step*")):  # DeepSpeed keeps the scheduler with the rest
        needed.append("scheduler.pt")
    for name in needed:
        if not (place / name).is_file():
            return f"it has no {name}"
    return None


def last_complete_checkpoint(folder: str | Path, weights_suffice: bool = False) -> str | None:
    """Return the latest complete checkpoint, as `fault_of` tells, in the folder of a run; None if there is none."""
    complete = (path for path in _checkpoints(folder) if fault_of(path, weights_suffice) is None)
    return next(map(str, complete), None)


def _checkpoints(folder: str | Path) -> list[Path]:
    """List the checkpoints in a folder, latest first."""
    found = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def checkpoint_to_resume(asked: str | bool | None, folder: str | Path, weights_suffice: bool = False) -> str | None:
    """Choose the checkpoint that `Trainer.train(resume_from_checkpoint=asked)` resumes from.

    Args:
        asked: Folder of a checkpoint; True for the last complete one in `folder`; anything false for none.
        folder: Output folder of the run.
        weights_suffice: As of `fault_of`.

    Raises:
        ValueError: If the named checkpoint is incomplete, or with True every checkpoint in the folder.
    """
    if not asked:
        return None
    if asked is not True:
        if fault := fault_of(asked, weights_suffice):
            raise ValueError(
                f"Cannot resume from {asked}: {fault}. resume_from_checkpoint=True takes the last complete checkpoint; "
                "from_pretrained loads weights alone."
            )
        return str(asked)
    if last := last_complete_checkpoint(folder, weights_suffice):
        return last
    faults = [f"{path.name}: {fault_of(path, weights_suffice)}" for path in _checkpoints(folder)]
    found = f"; found {'; '.join(faults)}" if faults else ""
    raise ValueError(f"There is no complete checkpoint in {folder} to resume from{found}. Start without resuming.")


# ------------------------------------------------------------------------------------------ what the run began with


def origin_of(place: Path) -> dict[str, Any]:
    """Return the settings that a run began with, from one of its checkpoints; empty if they are unknown."""
    try:
        return json.loads((place / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # written by an earlier version or by plain Trainer
        return {}


def guided_steps_of(checkpoint: str | Path | None) -> int | None:
    """Count the guided steps of a run up to a checkpoint: 0 without one, None if an earlier version wrote it."""
    return 0 if checkpoint is None else origin_of(Path(checkpoint)).get(GUIDED_STEPS)


def _origin(args: TrainingArguments, steps: int, guided: bool) -> dict[str, Any]:
    names = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed")
    return {name: getattr(args, name) for name in names} | {
        "split_batches": splits_batches(args),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "max_steps": steps,
        "guided": guided,
    }


def _samples(origin: dict[str, Any], config: GuidanceConfig) -> int | None:
    """Count the rows that a similarity was computed over; return None if that is unknown."""
    rows = origin.get("per_device_train_batch_size")
    if rows and origin.get("split_batches"):
        rows //= origin.get("world_size", 1)
    times = {"global": "world_size", "accumulated": "gradient_accumulation_steps"}.get(config.similarity_batch)
    return rows and rows * (origin.get(times, 1) if times else 1)


def check_goes_on(
    checkpoint: str, args: TrainingArguments, config: GuidanceConfig, guide: Mapping[str, Json] | None
) -> None:
    """Compare a run with the checkpoint that it resumes from.

    Differences that do not change what is trained give a warning.

    Args:
        checkpoint: Folder of the checkpoint.
        args: `TrainingArguments` of the run.
        config: Guidance settings of the run.
        guide: Identity of the guide; None without one.

    Raises:
        ValueError: If the guide or a setting that changes what is trained differs. The message names both values.
    """
    place = Path(checkpoint)
    if guide is None:
        if (place / CONFIG_NAME).is_file():
            logger.warning("%s was trained with guidance; from here on there is none: no guide was given.", place.name)
        return
    if not (place / CONFIG_NAME).is_file():
        logger.warning("%s was trained without guidance; from here on there is guidance.", place.name)
        return
    then, guide_then = GuidanceConfig.load(place)
    check_same_guide(guide, guide_then, place.name)
    changed = _changes(then.without_paths(), config.without_paths())
    began, now = origin_of(place), _origin(args, args.max_steps, True)
    decays = config.guidance_schedule != "constant" and config.guidance_stop_step is None
    if args.max_steps < 1 or not decays:  # the length is unknown, or the schedule does not depend on it
        began.pop("max_steps", None)
    origin = _changes(began, now)
    fatal = {name: words for name, words in changed.items() if name not in HARMLESS}
    other_batch = _samples(began, then) not in (None, _samples(now, config))
    fatal |= {name: words for name, words in origin.items() if name in FATAL | (BATCH if other_batch else set())}
    if fatal:
        raise ValueError(
            f"{place.name} was trained with other settings: {', '.join(fatal.values())}. Resuming would change "
            "what is trained. Give the same settings, or start a new run from its weights (from_pretrained)."
        )
    if changed:
        logger.warning("Resuming from %s with other settings: %s.", place.name, ", ".join(changed.values()))
    if origin:
        logger.warning(
            "Resuming from %s with other settings: %s. Data order, randomness or rounding will differ from an unbroken "
            "run.",
            place.name,
            ", ".join(origin.values()),
        )


def _changes(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return name → `name was 1, is 2`, for names that both have with different values."""
    return {k: f"{k} was {then[k]!r}, is {now[k]!r}" for k in then if k in now and then[k] != now[k]}


class ResumingMixin(Behind):
    """The part of `GuidanceMixin` that writes `trainer_state.json` last, so that it marks a checkpoint as complete."""

    guide: Any
    _guided: GuidedSteps
    _pass: tuple[int, int] | None = None  # over a stream: its number, from 1, and the step at which it began

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # a state left by an earlier run must not mark a new checkpoint as complete
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            origin = _origin(self.args, self.state.max_steps, self.guide is not None)
            origin[GUIDED_STEPS] = self._guided.total() if self.guide is not None else 0
            if self._pass is not None:
                origin[PASS], origin[PASS_BEGAN] = self._pass
            text = json.dumps(origin, indent=2) + "\n"
            (Path(output_dir) / ORIGIN).write_text(text, encoding="utf-8")
        self.accelerator.wait_for_everyone()  # Trainer does not wait, so rank 0 could finish before the others
