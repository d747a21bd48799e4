"""The command line that a card shows: only known settings with harmless values."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_guidance.card.redaction import own_names
from hf_guidance.config import AUTO, CHOICES
from hf_guidance.mapping import WEIGHT_SEPARATOR
from hf_guidance.similarity.registry import MEASURES

# flags of `accelerate launch` and `torchrun` for the number and kind of processes
COUNTS = ("num_processes", "num_machines", "nproc_per_node", "nnodes", "num_cpu_threads_per_process", "zero_stage")
SWITCHES = ("multi_gpu", "cpu", "use_cpu", "use_fsdp", "use_deepspeed", "standalone")
PRECISIONS = ("no", "fp16", "bf16", "fp8")
# fields with free text that may be private; fields with a word of SECRET in their name are left out too
PRIVATE = re.compile(
    r"run_name|logging_dir|project|trackio_.*|optim_args|.*_kwargs|(accelerator|parallelism|liger_kernel)_config"
)
SECRET = {"token", "secret", "key", "password"}
REPORTS = {"all", "none", *INTEGRATION_TO_CALLBACK}
POSSIBLE = {
    **CHOICES,
    "measure": (AUTO, *MEASURES),
    "log_measures": MEASURES,
    "report_to": REPORTS,
    "include_for_metrics": ("inputs", "loss"),
}
PUBLIC = "hub_model_id"  # begins with the user's name, but the card shows it anyway

TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")
NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
FLAG = re.compile(r"-+[^\W\d].*|--.*", re.DOTALL)  # not a negative number
TEXT = re.compile(r"(?!~)[\w.,+~*-]+(?:/[\w.,+~*-]+){0,3}", re.ASCII)
LONGEST = 100
# beginnings of tokens of Hugging Face, OpenAI, GitHub, GitLab, AWS, Slack, Google, npm and PyPI, of JWTs and of UUIDs
CREDENTIAL = re.compile(
    r"(?<![a-z0-9])(?:hf_(?!guidance)|api_org_|sk[-_][\w-]{8}|gh[a-z]_|github_pat_|glpat-|a[ks]ia[a-z0-9]{9}|xox[a-z]-|aiza"
    r"|ya29|eyj|npm_|pypi-|nvapi-|sg\.|r8_|dop_v1_|(?:\d{1,3}\.){3}\d{1,3}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})",
    re.IGNORECASE,
)
RANDOM = 16  # length from which a run of letters and digits may be random


def published_command(words: Sequence[str], parsers: Sequence[type]) -> tuple[str, bool]:
    """Select the part of a command line that anybody may read.

    Args:
        words: Words of the command line.
        parsers: Dataclasses whose fields are published if their values are harmless.

    Returns:
        The command, and whether anything was left out. The command is empty if its script cannot be named.
    """
    launcher, rest = _launcher(words)
    if launcher is None:
        return "", True
    start, script, rest, cut = _script(rest) if launcher[0] != "python" else ([], *_program(rest), False)
    if not script:
        return "", True
    dataclasses: Any = tuple(parsers)
    own = HfArgumentParser(dataclasses, add_help=False)._actions
    known = {flag: action for action in own if not _is_private(action.dest) for flag in action.option_strings}
    kept, more = _published(rest, known)
    return shlex.join([*launcher, *start, *script, *kept]), cut or more


def _launcher(words: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    for launcher in (["accelerate", "launch"], ["torchrun"], ["python"]):
        if list(words[: len(launcher)]) == launcher:
            return launcher, list(words[len(launcher) :])
    return None, []


def _script(words: list[str]) -> tuple[list[str], list[str], list[str], bool]:
    """Find the script in the words after a launcher.

    Returns:
        The launcher's flags to publish, the words that name the script, the words after it, and whether launcher flags
        are left out. No words name the script if it is not found.
    """
    for place, word in enumerate(words):
        is_module = word in ("-m", "--module")
        if is_module or (word.endswith(".py") and not word.startswith("-")):
            start, cut = _published(words[:place], LAUNCHER)
            return start, *_program(words[place:]), cut
    return [], [], [], True


def _program(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words that name a script or module (none if they are private), and the words after them."""
    flag = words[:1] if words[:1] in (["-m"], ["--module"]) else []
    path = Path("".join(words[len(flag) : len(flag) + 1]))
    name = str(path) if path.name and _is_harmless(str(path)) else path.name
    return ([*flag, name] if _is_harmless(name) else []), words[len(flag) + 1 :]


def _published(words: list[str], known: dict[str, argparse.Action]) -> tuple[list[str], bool]:
    """Select the known flags with harmless values, unchanged. Also tell whether anything was left out."""
    kept: list[str] = []
    bounds = [*(place for place, word in enumerate(words) if FLAG.fullmatch(word)), len(words)]
    cut = bounds[0] > 0  # words before the first flag
    for start, end in pairwise(bounds):
        if words[start] == "--":  # no word after it is a flag
            return kept, True
        flag, sign, attached = words[start].partition("=")
        values = [attached] if sign else words[start + 1 : end]
        action = known.get(flag)
        taken = _taken(action, values) if action else None
        if taken is None:
            cut = True
            continue
        kept += [flag + sign + "".join(taken)] if sign else [flag, *taken]
        cut = cut or end - start > (1 if sign else 1 + len(taken))
    return kept, cut


def _taken(action: argparse.Action, values: list[str]) -> list[str] | None:
    """Return the values of a flag as they may be published; None if one of them must be left out."""
    bare = action.nargs in (0, "?") or action.type is string_to_bool  # recipes accept any bool without a value
    if action.nargs == 0:
        values = []
    elif action.nargs != "+":
        sweep = [_published_value(action, value) for value in values] if _is_closed(action) else [None]
        values = values[:1] if None in sweep else values  # a recipe takes several values as a sweep
    if not values and not bare:
        return None
    taken = [_published_value(action, value) for value in values]
    return None if None in taken else [value for value in taken if value is not None]


def _is_closed(action: argparse.Action) -> bool:
    """Tell whether a flag takes only numbers or words of a list, so that a stray word is none of its values."""
    is_number = action.type in (int, float)
    return is_number or POSSIBLE.get(action.dest, action.choices) is not None


def _published_value(action: argparse.Action, value: str) -> str | None:
    """Return a value of a flag as it may be published; None if it must be left out."""
    if action.type is string_to_bool:
        return value if value.lower() in TRUTHS else None
    possible = POSSIBLE.get(action.dest, action.choices)
    if isinstance(action.type, type) and issubclass(action.type, Enum):
        possible = [member.value for member in action.type]
    if possible is not None:
        return value if value in possible else None
    if action.type in (int, float):
        return value if NUMBER.fullmatch(value) else None
    if action.type not in (str, None):
        return None
    value = Path(value).name if Path(value).is_absolute() else value
    if action.dest == "layer_pairs":
        pair, separator, weight = value.partition(WEIGHT_SEPARATOR)
        harmless = _is_harmless(pair) and (not separator or NUMBER.fullmatch(weight))
        return value if harmless else None
    return value if _is_harmless(value, own=action.dest == PUBLIC) else None


def _is_private(name: str) -> bool:
    return bool(PRIVATE.fullmatch(name) or SECRET & set(name.split("_")))


def _is_harmless(text: str, own: bool = False) -> bool:
    """Tell whether a text is a plain word or short relative path, and holds no credential.

    Unless `own` is true, it must not hold the user's or the machine's name either.
    """
    return bool(
        len(text) <= LONGEST
        and TEXT.fullmatch(text)
        and ".." not in text
        and not CREDENTIAL.search(text)
        and not any(map(_is_random, re.findall("[A-Za-z0-9]+", text)))
        and not _is_key(re.sub("[/.]", "", text))
        and (own or not _names_somebody(text))
    )


def _names_somebody(text: str) -> bool:
    names = "|".join(map(re.escape, own_names()))
    return bool(names and re.search(rf"(?<![a-z0-9])(?:{names})(?![a-z0-9])", text, re.IGNORECASE))


def _is_key(text: str) -> bool:
    """Tell whether a text without slashes and dots is a long run of capitals, small letters and digits, like a key."""
    return bool(re.fullmatch(r"(?=.*\d)(?=.*[a-z])(?=.*[A-Z])[A-Za-z0-9]{32,}", text))


def _is_random(run: str) -> bool:
    """Tell whether letters and digits look like a key: a long run with digits, or with capitals throughout."""
    kinds = ["d" if sign.isdigit() else "u" if sign.isupper() else "l" for sign in run]
    changes = sum(one != other for one, other in pairwise(kinds))
    return len(run) >= RANDOM and ("d" in kinds or 3 * changes > len(run))


def _of_launcher() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    for name in (*COUNTS, *SWITCHES, "mixed_precision", "config_file"):
        options: dict[str, Any] = {"type": int} if name in COUNTS else {}
        options |= {"action": "store_true"} if name in SWITCHES else {}
        options |= {"choices": PRECISIONS} if name == "mixed_precision" else {}
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **options)
    return dict(parser._option_string_actions)


LAUNCHER = _of_launcher()
