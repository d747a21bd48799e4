"""Redaction of private values: tokens, and the folders in absolute paths."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import re
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from hf_guidance.card.markdown import printable
from hf_guidance.config import Json

Value = TypeVar("Value")
Arguments = TypeVar("Arguments", bound=TrainingArguments)

TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|hf_oauth_[\w.-]{16,}|api_org_[A-Za-z0-9]{20,})")
SECRET = re.compile(r"token|secret|password|api_?key")
PART = r"[^\s/\\\"'`|<>]+(?: [^\s/\\\"'`|<>]+){0,2}"  # part of a path before a slash, spaces included
LAST = r"(?=[^\s/\\\"'`|<>])"
# /a/b/c, ~/b/c, ~alice/c, ../../b/c and file:///a/b/c, but not https://a/b/c, a/b/c or </s>
FOLDERS = re.compile(rf"(?:file://|(?<![\w/.<~]))(?:~[\w.-]*/|(?:\.\./)+|/(?!/))(?:{PART}/)*{LAST}")
WINDOWS = re.compile(rf"\b[A-Za-z]:\\(?:{PART}\\)*{LAST}")
ANYBODY = ("root", "user", "localhost")  # names that identify nobody
LEAST = 4  # shortest name to cut out everywhere; shorter ones are parts of words


def scrub(value: Value) -> Value:
    """Remove tokens, folders of paths, names of user and machine, and invisible signs from a JSON value's texts."""
    found: Any = _scrubbed(value)
    return found


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        text = WINDOWS.sub("", FOLDERS.sub("", TOKEN.sub("<token>", printable(value))))
        # a single word is an id or a setting, even if it is also a name
        return _own_names().sub("…", text) if " " in text else text
    if isinstance(value, dict):
        return {printable(str(name)): _scrubbed(entry) for name, entry in value.items()}
    return [_scrubbed(entry) for entry in value] if isinstance(value, list) else value


def _own_names() -> re.Pattern[str]:
    """Make a pattern of the names of user and machine as separate words."""
    words = "|".join(re.escape(name) for name in own_names() if len(name) >= LEAST)
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])") if words else re.compile(r"(?!)")


def own_names() -> set[str]:
    """Return the names of the user and of the machine, with and without its domain."""
    node = platform.node()
    return {os.environ.get("USER", ""), Path.home().name, node, node.partition(".")[0]} - {"", *ANYBODY}


def scrub_arguments(args: Arguments) -> Arguments:
    """Copy training arguments without tokens and without paths of this machine."""
    clean = copy.copy(args)
    for field in dataclasses.fields(args):
        setattr(clean, field.name, _without_paths(field.name, getattr(args, field.name)))
    return clean


def _without_paths(name: str, value: Any) -> Any:
    if type(value) is str and SECRET.search(name):
        return None
    if isinstance(value, os.PathLike) or type(value) is str:
        return os.path.basename(os.path.normpath(value)) if os.path.isabs(value) else value
    if type(value) is dict:
        return {key: _without_paths(str(key), entry) for key, entry in value.items()}
    return [_without_paths(name, entry) for entry in value] if type(value) is list else value


def scrub_state(path: Path) -> None:
    """Shorten the path of the best checkpoint in a trainer's saved state to its last part."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("best_model_checkpoint"):
        content["best_model_checkpoint"] = os.path.basename(content["best_model_checkpoint"])
    replace_text(path, as_json(content))


def as_json(content: Json) -> str:
    """Format a JSON value as files store it."""
    return json.dumps(content, indent=2) + "\n"


def replace_text(path: Path, text: str) -> None:
    """Replace a file by a new one, so that other links to the old file do not change."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
