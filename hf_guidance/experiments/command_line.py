"""The command line of a recipe: its own flags and those of `TrainingArguments` and `GuidanceConfig`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_guidance.config import GuidanceConfig

A = TypeVar("A")


def check_choice(flag: str, value: str, possible: Iterable[str]) -> None:
    """Raise ValueError if the value of a flag is not one of the possible ones."""
    if value not in possible:
        raise ValueError(f"--{flag} {value}: possible are {', '.join(possible)}.")


def flags_of_the_claim(claims: Mapping[str, str]) -> list[str]:
    """Return the flags that `--claim` on the command line stands for, and print them."""
    given = [word.removeprefix("--claim=") for word in sys.argv if word.startswith("--claim=")]
    given += [value for word, value in pairwise(sys.argv) if word == "--claim"]
    if not given:
        return []
    check_choice("claim", given[-1], claims or ["none in this recipe"])
    if os.environ.get("RANK", "0") == "0":
        print(f"--claim {given[-1]}: {' '.join(claims[given[-1]].split())}", flush=True)
    return claims[given[-1]].split()


def parse(
    description: str,
    arguments: type[A],
    defaults: Callable[[A], dict[str, Any]],
    *,
    refused: Collection[str],
    instead: str,
) -> tuple[A, TrainingArguments, GuidanceConfig]:
    """Parse the flags of a recipe.

    Args:
        description: Text for `--help`.
        arguments: Dataclass of the recipe's own flags.
        defaults: Maps the recipe's flags to defaults of the other two dataclasses.
        refused: Flags that the recipe does not accept.
        instead: What to use in their place, for the error message.

    Returns:
        The recipe's arguments, the `TrainingArguments` and the `GuidanceConfig`.

    Raises:
        ValueError: If a flag is unknown or refused, or one of the three dataclasses refuses a value.
    """
    first = _parser(arguments, add_help=False)
    recipe, _ = _parsed(first)
    values = defaults(recipe)
    given = {word.split("=")[0] for word in sys.argv}
    if wrong := set(refused) & given:
        raise ValueError(f"{', '.join(sorted(wrong))}: {instead}.")
    parser = _parser(arguments, TrainingArguments, GuidanceConfig, description=description)
    if "--layer_pairs" in given:  # pairs name the layers themselves
        values = {name: value for name, value in values.items() if name not in ("target_layers", "guide_layers")}
    parser.set_defaults(**values)
    *parsed, left = _parsed(parser)
    if unknown := [word for word in left if word.startswith("-")] or left:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown flags: {', '.join(unknown)}.{hint} --help lists all.")
    return tuple(parsed)


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
