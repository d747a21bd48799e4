"""Taking out what must not leave the machine: tokens, and the folders in absolute paths."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import re
import shlex
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|hf_oauth_[\w.-]{16,}|api_org_[A-Za-z0-9]{20,})")
# --hub_token, --hub-token and what argparse takes for it, --hub_tok; --wandb_api_key, --secret; hydra's +hub_token=
TOKEN_FLAG = re.compile(
    r"(?:--?|\+{1,2})?[\w.-]*(?:(?<!bos[_-])(?<!eos[_-])(?<!pad[_-])(?<!unk[_-])(?<!sep[_-])(?<!cls[_-])(?<!mask[_-])token"
    r"|secret[\w-]*|passw(?:or)?d|passphrase|(?:api|access|private)[_-]?key|credentials?|auth(?:orization)?)"
    r"|--hub[_-]t(?:o(?:k(?:en?)?)?)?",
    re.IGNORECASE,
)
LOGIN = re.compile(r"(?<=://)[^\s/]+@")  # user and password in an address
# "hub_token": "abc" within a word, and ?token=abc in an address
WITHIN = re.compile(
    r"""([\w-]*(?:token|secret|passw(?:or)?d|api_?key)[\w-]*["']?\s*[:=]\s*["']?)[^"'&,;}\s]+""", re.IGNORECASE
)
ATTACHED = re.compile(r"(-[\w-]*:?)(/.*)")  # -o/home/me/out
SECRET = re.compile(r"token|secret|password|api_?key")
PART = r"[^\s/\\\"'`|<>]+(?: [^\s/\\\"'`|<>]+){0,2}"  # of a path, spaces and all, before a slash
LAST = r"(?=[^\s/\\\"'`|<>])"
# /a/b/c, ~/b/c, ~alice/c, ../../b/c and file:///a/b/c, but not https://a/b/c, a/b/c or </s>
FOLDERS = re.compile(rf"(?:file://|(?<![\w/.<~]))(?:~[\w.-]*/|(?:\.\./)+|/(?!/))(?:{PART}/)*{LAST}")
WINDOWS = re.compile(rf"\b[A-Za-z]:\\(?:{PART}\\)*{LAST}")
ANYBODY = ("root", "user", "localhost")  # tell nobody from anybody else
LEAST = 4  # letters of a name that is cut out wherever it stands; shorter ones are parts of words


def scrub(value: Any) -> Any:
    """A JSON value whose texts hold neither a token nor the folders of a path nor this machine's names."""
    if isinstance(value, str):
        text = WINDOWS.sub("", FOLDERS.sub("", TOKEN.sub("<token>", value)))
        return (
            _own_names().sub("…", text) if " " in text else text
        )  # one word is an id or a setting, whoever has its name
    if isinstance(value, dict):
        return {name: scrub(entry) for name, entry in value.items()}
    return [scrub(entry) for entry in value] if isinstance(value, list) else value


def _own_names() -> re.Pattern[str]:
    """The user's name and the machine's, as words of their own."""
    names = [os.environ.get("USER", ""), Path.home().name, platform.node()]
    words = "|".join(re.escape(name) for name in names if len(name) >= LEAST and name not in ANYBODY)
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])") if words else re.compile(r"(?!)")


def without_tokens(words: list[str]) -> list[str]:
    """A command line without the flags that hold a token."""
    clean: list[str] = []
    for word in words:
        if clean and clean[-1].startswith("-") and TOKEN_FLAG.fullmatch(clean[-1]) and not word.startswith("-"):
            clean.pop()  # the flag, and its value with it
        elif not ("=" in word and TOKEN_FLAG.fullmatch(word.partition("=")[0])):
            node = re.escape(platform.node() or "localhost")
            here = re.compile(rf"(?:(?<=://)|(?<==)|^){node}(?=[:/]|$)")  # however short a name
            word = LOGIN.sub("", TOKEN.sub("<token>", word))
            word = WITHIN.sub(r"\1<token>", word) if re.search(r"[?&{\s]", word) else word
            clean.append(here.sub("localhost", word))
    return clean


def scrub_command(words: list[str]) -> str:
    """A command line without tokens, its absolute paths cut down to their last part."""
    clean = []
    for word in without_tokens(words):
        flag, sign, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if not sign and (parts := ATTACHED.fullmatch(word)):
            flag, value = parts.groups()
        elif word.startswith("-") and not sign:
            flag, value = word, ""
        clean.append(flag + sign + ",".join(map(_last_part, value.split(","))))
    return shlex.join(clean)


def _last_part(value: str) -> str:
    """Of an absolute path; of the folder of the user, whose name is theirs, nothing."""
    if not Path(value).is_absolute():
        return str(scrub(value))
    return "." if Path(value) == Path.home() else Path(value).name


def scrub_arguments(args: Any) -> Any:
    """A copy of training arguments without tokens and without paths of this machine."""
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
    """Cut the path of the best checkpoint in a trainer's saved state down to its last part."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("best_model_checkpoint"):
        content["best_model_checkpoint"] = os.path.basename(content["best_model_checkpoint"])
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
