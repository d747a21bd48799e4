"""Sweeps: a guidance flag with several values makes a run of each guided run at each value."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field, fields, make_dataclass, replace
from itertools import product
from typing import Any

from transformers import HfArgumentParser

from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.experiments.run import Run

OWN_FLAGS = {  # end of a run's name → the field that it sets, and the flag of recipes that it takes this from
    "_stopped": ("guidance_stop_step", "stop_step"),
    "_decayed": ("guidance_stop_step", "stop_step"),
    "_until_similar": ("guidance_stop_similarity", "stop_similarity"),
}
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
    swept = {name: values for name, values in found.items() if len(values) > 1}
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
    read = {
        name: [getattr(parser.parse_args([f"--{name}", value]), name) for value in values]
        for name, values in sweeps.items()
    }
    for name, several in read.items():
        if twice := [value for place, value in enumerate(several) if value in several[:place]]:
            raise ValueError(f"--{name} {' '.join(sweeps[name])} names {twice[0]} twice: name each once.")
    found: dict[str, dict[str, Any]] = {}
    for values in product(*read.values()):
        chosen = dict(zip(read, values, strict=True))
        own = {name: chosen[name] for name in known if name in chosen}
        replace(guidance, **own)  # which checks them
        found["-".join(re.sub(r"[^\w.]+", "_", f"{name}_{value}") for name, value in own.items())] = own
    return found


def with_lists(settings: Mapping[str, Mapping[str, Json]]) -> type[GuidanceConfig]:
    """Return a `GuidanceConfig` whose fields that are swept over words take several, for the command that is published.

    Args:
        settings: Result of `settings_of_sweeps`.
    """
    names = {name for own in settings.values() for name, value in own.items() if isinstance(value, (str, bool))}
    lists: Any = [(name, list[str], field(default_factory=list)) for name in sorted(names)]
    return make_dataclass(GuidanceConfig.__name__, lists, bases=(GuidanceConfig,))


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


def check_given(
    given: Collection[str], sweeps: Mapping[str, Sequence[str]], guidance: GuidanceConfig, runs: Sequence[Run]
) -> None:
    """Raise ValueError for a flag of guidance that would change nothing, as the chosen runs set its field themselves.

    Args:
        given: Names of the flags that the user gave. Those of a claim are for whichever run takes them.
        sweeps: Result of `take_sweeps`.
        guidance: The settings that all runs share.
        runs: The runs of a seed.
    """
    guided = [run for run in runs if run.guide is not None]
    for name, values in sweeps.items():
        if fixed := [run for run in guided if name in run.guidance]:
            raise ValueError(
                f"--{name} {' '.join(values)}: the run {fixed[0].name} itself sets it to "
                f"{_words(fixed[0].guidance[name])}, and would be trained {len(values)} times alike. "
                f"{_remedy(name, fixed[0])}"
            )
        if name in given and not guided:
            raise ValueError(
                f"--{name} {' '.join(values)}: a guided run is made at each value, but none of the runs is guided "
                f"({', '.join(run.name for run in runs)}). Add one to --runs, or leave --{name} out."
            )
    for name in (known.name for known in fields(guidance) if known.name in given and known.name not in sweeps):
        value, own = getattr(guidance, name), {run.name: run.guidance.get(name) for run in guided}
        if guided and all(name in run.guidance for run in guided) and any(other != value for other in own.values()):
            set_to = ", ".join(f"{run} sets it to {_words(other)}" for run, other in own.items())
            raise ValueError(
                f"--{name} {_words(value)} would change nothing: of the guided runs {set_to}. "
                f"{_remedy(name, guided[0])}"
            )


def _words(value: Json) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _remedy(name: str, run: Run) -> str:
    """Tell what to do about a flag whose field a run sets itself."""
    taken = next((flag for end, (own, flag) in OWN_FLAGS.items() if run.name.endswith(end) and own == name), None)
    other = "" if taken is None else f", or give --{taken}, whose value {run.name} takes"
    return f"Leave --{name} out, or choose other --runs{other}."
