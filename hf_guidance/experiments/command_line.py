"""The command line of a recipe: its own flags and those of `TrainingArguments` and `GuidanceConfig`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_guidance.config import GuidanceConfig

A = TypeVar("A")


def check_choice(flag: str, value: str, possible: Iterable[str]) -> None:
    """Raise ValueError if the value of a flag is not one of the possible ones."""
    if value not in possible:
        raise ValueError(f"--{flag} {value}: possible are {', '.join(possible)}.")


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
        ValueError: If a flag is refused, or one of the three dataclasses refuses a value.
    """
    kind: Any = arguments
    first: Any = _allow_bare_flags(HfArgumentParser(kind, add_help=False, allow_abbrev=False))
    recipe, _ = first.parse_args_into_dataclasses(return_remaining_strings=True)
    values = defaults(recipe)
    given = {word.split("=")[0] for word in sys.argv}
    if wrong := set(refused) & given:
        raise ValueError(f"{', '.join(sorted(wrong))}: {instead}.")
    dataclasses: Any = (arguments, TrainingArguments, GuidanceConfig)
    parser: Any = _allow_bare_flags(HfArgumentParser(dataclasses, description=description, allow_abbrev=False))
    if "--layer_pairs" in given:  # pairs name the layers themselves
        values = {name: value for name, value in values.items() if name not in ("target_layers", "guide_layers")}
    parser.set_defaults(**values)
    parsed: Any = parser.parse_args_into_dataclasses()
    return parsed


def _allow_bare_flags(parser: Any) -> Any:
    """Let a bare `--flag` mean true for an optional bool without default, where HfArgumentParser requires a value."""
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True
    return parser
