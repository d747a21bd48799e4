"""Taking out what must not leave the machine: tokens, and the folders in absolute paths."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
TOKEN_FLAG = re.compile(r"--\w*token")
# /a/b/c and file:///a/b/c, but not https://a/b/c, a/b/c or </s>
FOLDERS = re.compile(r"(?:file://|(?<![\w:/.<\[~-]))~?/(?:[^\s/\"'`|<>]+/)*(?=[^\s/\"'`|<>])")


def scrub(value: Any) -> Any:
    """A JSON value whose texts hold neither a token nor the folders of an absolute path."""
    if isinstance(value, str):
        return FOLDERS.sub("", TOKEN.sub("<token>", value))
    if isinstance(value, dict):
        return {name: scrub(entry) for name, entry in value.items()}
    return [scrub(entry) for entry in value] if isinstance(value, list) else value


def without_tokens(words: list[str]) -> list[str]:
    """A command line without the flags that hold a token."""
    clean: list[str] = []
    for word in words:
        if clean and TOKEN_FLAG.fullmatch(clean[-1]) and not word.startswith("-"):
            clean.pop()  # the flag, and its value with it
        elif not ("=" in word and TOKEN_FLAG.fullmatch(word.partition("=")[0])):
            clean.append(TOKEN.sub("<token>", word))
    return clean


def scrub_command(words: list[str]) -> str:
    """A command line without tokens, its absolute paths cut down to their last part."""
    clean = []
    for word in without_tokens(words):
        flag, sign, value = word.partition("=") if word.startswith("-") else ("", "", word)
        clean.append(flag + sign + (Path(value).name if Path(value).is_absolute() else scrub(value)))
    return shlex.join(clean)


def scrub_arguments(args: Any) -> Any:
    """A copy of training arguments without tokens and without paths of this machine."""
    clean = copy.copy(args)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if "token" in field.name and isinstance(value, str):
            setattr(clean, field.name, None)
        elif isinstance(value, (str, os.PathLike)) and os.path.isabs(value):
            setattr(clean, field.name, os.path.basename(os.path.normpath(value)))
    return clean


def scrub_state(path: Path) -> None:
    """Cut the path of the best checkpoint in a trainer's saved state down to its last part."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("best_model_checkpoint"):
        content["best_model_checkpoint"] = os.path.basename(content["best_model_checkpoint"])
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
