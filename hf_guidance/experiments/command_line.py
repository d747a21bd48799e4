"""The command line of a recipe: its own flags and those of `TrainingArguments` and `GuidanceConfig`."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.experiments.arguments import RecipeArguments, check_numbers

A = TypeVar("A")
HELP: dict[str, type | None] = {  # flag → whose flags it explains; None: the recipe's own
    "-h": None,
    "--help": None,
    "--help_guidance": GuidanceConfig,
    "--help_training": TrainingArguments,
}
WIDTH = 120  # of the pages of help


def check_choice(flag: str, value: str, possible: Iterable[str]) -> None:
    """Raise ValueError if the value of a flag is not one of the possible ones."""
    possible = list(possible)
    if value in possible:
        return
    names, said, meant = value.split(), value, ""
    if len(names) > 1:
        said = repr(value)
        meant = (
            f" If a list is meant: [{', '.join(names)}] in a file for --config, no quotation marks on the command line."
        )
    raise ValueError(f"--{flag} {said}: possible are {', '.join(possible)}.{meant}")


def names_of(words: Iterable[str]) -> list[str]:
    """Return the names of the flags of a command line, with underscores."""
    return [word.split("=")[0].replace("-", "_").lstrip("_") for word in words if word.startswith("--")]


def with_flags_of_the_file(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the flags of its `--config` in place of that; other flags replace them.

    Args:
        words: The command line, without the program.

    Raises:
        ValueError: If a flag is given twice, or the file cannot be read.
    """
    given = names_of(words)
    if twice := _first_twice(given):
        raise ValueError(f"--{twice} is given twice: which value is meant?")
    own = list(words)
    file = _taken(own, "--config")
    if file is None:
        return own
    return [word for name, value in flags_of_the_file(file).items() if name not in given for word in value] + own


def with_flags_of_the_claim(words: Sequence[str], claims: Mapping[str, str]) -> list[str]:
    """Return the words of a command line behind the flags that its `--claim` stands for, which are printed."""
    claim = value_of(words, "--claim")
    if claim is None:
        return list(words)
    check_choice("claim", claim, claims or ["none in this recipe"])
    flags: dict[str, list[str]] = {}
    for word in claims[claim].split():
        if word.startswith("--"):
            flags[name := word] = []  # of a flag that is there twice, the last one counts
        else:
            flags[name].append(word)
    own = [word for name, values in flags.items() for word in (name, *values)]
    if os.environ.get("RANK", "0") == "0":
        print(f"--claim {claim}: {' '.join(own)}", flush=True)
    return [*own, *words]


def value_of(words: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag."""
    given = [value for word, value in pairwise(words) if word == flag]
    given += [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
    return given[-1] if given else None


def _taken(words: list[str], flag: str) -> str | None:
    """Return the value of a flag, and remove both from the words."""
    value = value_of(words, flag)
    for word in (flag, f"{flag}={value}"):
        if value is not None and word in words:
            place = words.index(word)
            del words[place : place + (2 if word == flag else 1)]
    return value


def flags_of_the_file(path: str) -> dict[str, list[str]]:
    """Read flags from a YAML or JSON file: a mapping of names to values, as `HfArgumentParser` takes it.

    Returns:
        Name of each flag → its words on a command line.

    Raises:
        ValueError: If the file cannot be read or holds no such mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if twice := _twice(yaml.compose(text, yaml.SafeLoader)):
            raise ValueError(f"--config {path} names {twice!r} twice: which value is meant?")
        values = yaml.safe_load(text)  # of which JSON is a part
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict) or any(not isinstance(name, str) for name in values):
        raise ValueError(f"--config {path} holds {type(values).__name__}; expected names of flags with their values.")
    names = [name.replace("-", "_") for name in values]
    if twice := _first_twice(names):
        raise ValueError(f"--config {path} names {twice!r} twice: which value is meant?")
    if "config" in names:
        raise ValueError(f"--config {path} names 'config': a file may not name another one.")
    values = dict(zip(names, values.values(), strict=True))
    return {
        name: [f"--{name}", *(_word(v) for v in (value if isinstance(value, list) else [value]))]
        for name, value in values.items()
        if value is not None
    }


def _twice(node: yaml.Node | None) -> str | None:
    """Find a key that a mapping of the file, or one within it, holds twice; None if there is none."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
    return _first_twice(keys) or next((name for _, value in pairs if (name := _twice(value))), None)


def _first_twice(names: Iterable[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)  # true and false, numbers, mappings


def parse(
    description: str,
    arguments: type[A],
    defaults: Callable[[A], dict[str, Any]],
    *,
    refused: Collection[str],
    instead: str,
    file: str | None = None,
) -> tuple[A, TrainingArguments, GuidanceConfig]:
    """Parse the flags of a recipe.

    Args:
        description: Text for `--help`.
        arguments: Dataclass of the recipe's own flags.
        defaults: Maps the recipe's flags to defaults of the other two dataclasses.
        refused: Flags that the recipe does not accept.
        instead: What to use in their place, for the error message.
        file: The file with flags that were put in place of `--config`, which is named if an unknown flag stands in it.

    Returns:
        The recipe's arguments, the `TrainingArguments` and the `GuidanceConfig`.

    Raises:
        ValueError: If a flag is unknown or refused, or one of the three dataclasses refuses a value.
    """
    first = _parser(arguments, add_help=False)
    recipe, left = _parsed(first)
    if isinstance(recipe, RecipeArguments):
        check_numbers(recipe)
    values = defaults(recipe)
    if asked := next((flag for flag in left if flag in HELP), None):
        print(help_text(asked, description, arguments, values))
        sys.exit(0)
    given = {word.split("=")[0] for word in sys.argv}
    if wrong := set(refused) & given:
        raise ValueError(f"{', '.join(sorted(wrong))}: {instead}.")
    parser = _parser(arguments, TrainingArguments, GuidanceConfig, description=description)
    if "--layer_pairs" in given:  # pairs name the layers themselves
        values = {name: value for name, value in values.items() if name not in ("target_layers", "guide_layers")}
    parser.set_defaults(**values)
    *parsed, left = _parsed(parser)
    if left and not any(word.startswith("-") for word in left):
        place = sys.argv.index(left[0]) if left[0] in sys.argv else 0
        flag = next((word for word in reversed(sys.argv[:place]) if word.startswith("--")), None)
        if flag is not None:
            more = f", and {flag}s tries several" if f"{flag}s" in parser._option_string_actions else ""
            raise ValueError(
                f"{flag} takes one value, and {' '.join(left)} is left over: only flags of guidance take several, as a "
                f"sweep{more}."
            )
    if unknown := [word for word in left if word.startswith("-")] or left:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        of_file = set() if file is None else {f"--{name}" for name in flags_of_the_file(file)} & set(unknown)
        where = f" ({', '.join(sorted(of_file))} in --config {file})" if of_file else ""
        raise ValueError(f"unknown flags: {', '.join(unknown)}{where}.{hint} --help lists all.")
    return tuple(parsed)


def help_text(asked: str, description: str, arguments: type, values: Mapping[str, Json]) -> str:
    """Write one of the three pages of help: of the recipe's own flags, of guidance, or of training.

    Args:
        asked: The flag that asks for it, one of `HELP`.
        description: What the recipe does.
        arguments: Dataclass of the recipe's own flags.
        values: What the recipe sets where nothing is given.
    """
    kind = HELP[asked] or arguments
    layout = partial(argparse.HelpFormatter, width=WIDTH, max_help_position=32)
    parser = _parser(kind, add_help=False, prog=Path(sys.argv[0]).name, formatter_class=layout)
    for action in parser._actions:  # each flag once, with a short name for its value
        action.option_strings = action.option_strings[:1]
        action.metavar = None if action.nargs == 0 else "X"
        if action.choices:
            action.help = f"{action.help or ''} One of {', '.join(map(str, action.choices))}."
        default = values.get(action.dest, action.default)
        if default not in (None, False, "", argparse.SUPPRESS):
            words = " ".join(map(str, default)) if isinstance(default, list) else str(default)
            action.help = f"{action.help or ''} (default: {words.replace('%', '%%')})"
    flags = parser.format_help().partition("options:")[2].strip("\n")
    if kind is not arguments:
        return f"{kind.__name__}, all of whose fields are flags of the recipes:\n\n{flags}"
    guidance = textwrap.fill(" ".join(f"--{field.name}" for field in fields(GuidanceConfig)), WIDTH)
    return (
        f"{description.strip()}\n\nFlags of this recipe:\n\n{flags}\n\nFlags of guidance (--help_guidance explains "
        f"them):\n\n{guidance}\n\nFlags of training (--help_training): all fields of TrainingArguments."
    )


def _parser(*kinds: type, **options: Any) -> Any:
    """Make a parser whose errors are one line each. argparse would print all flags, in every process."""

    def refuse(message: str) -> None:
        raise ValueError(f"{message}. --help lists all flags.")

    dataclasses: Any = kinds
    parser: Any = _allow_bare_flags(HfArgumentParser(dataclasses, allow_abbrev=False, **options))
    parser.error = refuse
    return parser


def _parsed(parser: Any) -> Any:
    try:
        return parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except (ValueError, OSError, ImportError) as error:  # the settings that TrainingArguments refuses
        raise ValueError(str(error)) from error


def _allow_bare_flags(parser: Any) -> Any:
    """Let a bare `--flag` mean true for an optional bool without default, where HfArgumentParser requires a value."""
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True
    return parser
