"""Sweeps: a guidance flag with several values makes a run of each guided run at each value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from transformers import HfArgumentParser

from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.experiments.run import Run

NOT_SWEPT = ("cache_guide", "cache_dtype", "sample_id_column")  # they change where a run computes, not what


def take_sweeps(words: list[str]) -> dict[str, list[str]]:
    """Cut every guidance flag with several values down to its first, in place, and return the values.

    Args:
        words: A command line. Where a flag is given again, the last one counts.

    Returns:
        Name of a field of `GuidanceConfig` → its values as written, for each field with more than one.

    Raises:
        ValueError: If a field with several values cannot be swept.
    """
    parser = HfArgumentParser(GuidanceConfig)  # type: ignore[arg-type]
    single = {
        option: action.dest
        for action in parser._actions
        if action.nargs in (None, "?")
        for option in action.option_strings
    }
    found: dict[str, list[str]] = {}
    place = 0
    while place < len(words):
        name, place = single.get(words[place]), place + 1
        if name is None:
            continue
        end = next((i for i in range(place, len(words)) if words[i].startswith("--")), len(words))
        found[name] = words[place:end]
        del words[place + 1 : end]
    swept = {name: list(dict.fromkeys(values)) for name, values in found.items() if len(values) > 1}
    if wrong := [name for name in NOT_SWEPT if name in swept]:
        raise ValueError(f"--{wrong[0]} {' '.join(swept[wrong[0]])}: one value is expected, as this is not swept.")
    return swept


def settings_of_sweeps(sweeps: Mapping[str, Sequence[str]], guidance: GuidanceConfig) -> dict[str, dict[str, Any]]:
    """Return every combination of the values that are swept, checked as settings.

    Args:
        sweeps: Result of `take_sweeps`.
        guidance: The other settings.

    Returns:
        What is added to the name of a run, such as `measure_ridge` → the fields of `GuidanceConfig`.

    Raises:
        ValueError: If a value is none of its field, or does not go with the other settings.
    """
    if not sweeps:
        return {}
    known = [field.name for field in fields(GuidanceConfig)]
    parser: Any = HfArgumentParser(GuidanceConfig)  # type: ignore[arg-type]

    def refuse(message: str) -> None:
        raise ValueError(f"{message}. --help lists all flags.")

    parser.error = refuse
    found: dict[str, dict[str, Any]] = {}
    for values in product(*sweeps.values()):
        chosen = dict(zip(sweeps, values, strict=True))
        words = [word for name, value in chosen.items() for word in (f"--{name}", value)]
        read = vars(parser.parse_args(words))
        own = {name: read[name] for name in known if name in chosen}
        replace(guidance, **own)  # which checks them
        found["-".join(re.sub(r"[^\w.]+", "_", f"{name}_{value}") for name, value in own.items())] = own
    return found


def swept(runs: Callable[[int], list[Run]], settings: Mapping[str, Mapping[str, Json]]) -> Callable[[int], list[Run]]:
    """Return the runs of a seed with one at each setting in place of each guided run.

    Args:
        runs: Seed → its runs.
        settings: Result of `settings_of_sweeps`. What a run sets itself stays.
    """
    if not settings:
        return runs

    def of(seed: int) -> list[Run]:
        return [
            replace(run, name=f"{run.name}-{label}", guidance={**fields, **run.guidance}) if label else run
            for run in runs(seed)
            for label, fields in (settings.items() if run.guide is not None else [("", {})])
        ]

    return of
