"""One run from its trainer to its record: trained from where it stopped, evaluated, tested, saved; or read if finished.

Recipes (`comparison`) and comparisons of the user's own trainers (`matched_runs`) both stand on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_guidance.config import Json
from hf_guidance.experiments.files import read_json, write_json
from hf_guidance.experiments.report import Record
from hf_guidance.experiments.run import SETTINGS, Run, check_same_settings, record_of
from hf_guidance.guide.identity import check_same_guide, identity
from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.layer_maps import LayerMaps

RESULT = "result.json"
NEEDED = (  # fields of every record, of earlier versions too
    *("run", "seed", "steps", "seconds", "settings", "environment", "target", "parameters", "guide"),
    *("validation", "test", "curve", "training", "similarity"),
)


def recorded(place: Path) -> Record | None:
    """Read the record of a finished run; None if it is not finished.

    Args:
        place: Its folder.

    Raises:
        ValueError: If the record is damaged, or is none.
    """
    if not (place / RESULT).is_file():
        return None
    record: Record = read_json(place / RESULT)
    if missing := [name for name in NEEDED if name not in record]:
        raise ValueError(
            f"{place / RESULT} lacks {', '.join(missing)}, which the record of a run has: delete it to train that run "
            "again, or choose another output_dir."
        )
    return record


def result_of(run: Run, place: Path, settings: Mapping[str, Json]) -> Record | None:
    """Read the record of a finished run; None if it is not finished.

    Args:
        run: The run.
        place: Its folder.
        settings: Its settings, from `run.settings_of`.

    Raises:
        ValueError: If the folder holds a run with other settings, finished or not, or with another guide, or a record
            that is none.
    """
    check_same_settings(place, settings)
    result = recorded(place)
    if result is not None and run.guide is not None:
        check_same_guide(identity(run.guide()), result["guide"], str(place))
    return result


def train_and_record(
    run: Run,
    trainer: Trainer,
    place: Path,
    settings: Mapping[str, Json],
    metric: str,
    test: Callable[[Trainer], dict[str, float]],
    maps: Callable[[Trainer], LayerMaps | None] = lambda trainer: None,
) -> Record:
    """Train a run from its last complete checkpoint, evaluate, test and save it, and write its `result.json`.

    Args:
        run: The run.
        trainer: Its trainer, with a `TrainingClock`.
        place: Its folder, the trainer's `output_dir`.
        settings: Its settings, from `run.settings_of`.
        metric: Name of the main metric.
        test: Returns the metrics of the test, with the prefix `test_`.
        maps: Prepares maps of all layers of a guided run before training.

    Returns:
        The record. Maps are added to it, and not to the file, which is written before anything that could fail.
    """
    own: Any = trainer
    if trainer.is_world_process_zero():
        write_json(place / SETTINGS, dict(settings))
        long = trainer.args.max_steps > 0
        length = f"{trainer.args.max_steps} steps" if long else f"{trainer.args.num_train_epochs:g} epochs"
        print(f"{'/'.join(place.parts[-2:])}: {length}", flush=True)
    layers = maps(trainer) if run.guide else None
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(place))
    last = [log for log in trainer.state.log_history if log.get("step") == trainer.state.global_step]
    if not any("eval_loss" in log for log in last):
        trainer.evaluate()  # every run needs a value at its last step
    tested = test(trainer)
    if trainer.args.push_to_hub:
        own.stage_push()  # pushed with its card, when there are all runs that the card compares it with
    else:
        trainer.save_model(str(place), _internal_call=True)
    result = record_of(run, own, settings, tested, metric)
    if trainer.is_world_process_zero():
        write_json(place / RESULT, result)
    if layers:
        layers.compute(own, "after")
        result["similarity_maps"] = layers.maps
    return result
