"""Redaction of the settings files that are pushed with a model: tokens and paths of this machine are removed."""

from __future__ import annotations

import json
import logging
import ntpath
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_guidance.card.redaction import as_json, replace_text

logger = logging.getLogger(__name__)

SETTINGS = "*config*.json"  # config, generation_config, tokenizer_config, adapter_config, preprocessor_config, …
SECRET = re.compile(
    r"token|(?:.*_)?(?:(?:hub|hf|auth|access|api|refresh|bearer|session|wandb|git(?:hub|lab)?)_token|api_?key|passw(?:or)?d"
    r"|passphrase|(?:client_|secret_)?secret|(?:access|secret|private)_key(?:_id)?|credentials?)"
)
# words of a vocabulary or names of classes, which may be any text
VOCABULARY = re.compile(
    r"(?:bos|eos|pad|unk|sep|cls|mask)_token|.*_tokens_decoder|.*special_tokens?(?:_.*)?|.*chat_template.*|id2label|label2id"
)
WORD = re.compile(r".*_tokens?")  # also words of a vocabulary, unless they look like a credential
# credentials of Hugging Face, OpenAI, GitHub, GitLab, AWS, Slack and Google, JWTs and private keys
CREDENTIAL = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_(?:oauth_)?[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[a-z]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*|nvapi-[\w-]{16,}|SG\.[\w-]{16,}|-----BEGIN[^\0]*)"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)|(?<=Bearer )\S+"  # in an address, and in a header
)
PART = r"""[^()\[\]{}|*?<>"'\n]*"""  # part of a path; if it has a space, another slash must follow
PATH = re.compile(rf"(?=\S*$|.*\S[/\\]+\S)(?:file:/|~[\w.-]*[/\\]|/(?!/)|[A-Za-z]:[/\\]|\\\\\w){PART}")


def scrub_settings(folder: Path, output: Path) -> None:
    """Remove tokens and paths of this machine from the settings files and cards in a folder, and warn of each change.

    Args:
        folder: Folder of files to push. Files elsewhere that are linked to them do not change.
        output: Folder whose path is removed everywhere, like those of the user and of the process.
    """
    places = re.compile("|".join(_places(output)))
    for path in sorted([*folder.rglob(SETTINGS), *folder.rglob("README.md")]):
        found: list[str] = []
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                clean = as_json(_clean(json.loads(text), "", places, found))
            else:  # cards by transformers or PEFT hold the path of the base model
                clean = _cut(text, "text", places, found)
        except ValueError as error:  # neither JSON nor text
            path.unlink()
            logger.warning("%s cannot be read (%s): it is not pushed.", path.relative_to(folder).as_posix(), error)
            continue
        if found:
            replace_text(path, clean)
            logger.warning(
                "%s is pushed without values that look like a token or a path of this machine, in: %s. The file in %s "
                "keeps them.",
                path.relative_to(folder).as_posix(),
                ", ".join(dict.fromkeys(found)),
                output,
            )


def _places(output: Path) -> Iterator[str]:
    """Make patterns of paths in the folders of this machine."""
    for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()), output.absolute(), output.resolve()):
        if place.name:
            yield rf"""(?:file://)?{re.escape(str(place))}(?![\w-])(?:[/\\][^\s/\\"'`|<>:;,]+)*"""


def _clean(value: Any, name: str, places: re.Pattern[str], found: list[str]) -> Any:
    """Copy a JSON value without tokens and paths. Add the names of the fields that had one to `found`."""
    if isinstance(value, dict):
        kept = {}
        for key, entry in value.items():
            field = f"{name}.{key}" if name else key
            spelt = key.lower().replace("-", "_")
            if SECRET.fullmatch(spelt):
                if entry in (None, "") or isinstance(entry, bool):
                    kept[key] = entry
                else:
                    found.append(field)
            elif VOCABULARY.fullmatch(spelt) or (WORD.fullmatch(spelt) and not CREDENTIAL.search(json.dumps(entry))):
                kept[key] = entry
            else:
                kept[_clean(key, field, places, found)] = _clean(entry, field, places, found)
        return kept
    if isinstance(value, list):
        return [_clean(entry, name, places, found) for entry in value]
    if not isinstance(value, str):
        return value
    if PATH.fullmatch(value) and _last_part(value) != value:
        found.append(name)
        value = _last_part(value)
    return _cut(value, name, places, found)


def _cut(text: str, name: str, places: re.Pattern[str], found: list[str]) -> str:
    """Copy a longer text without tokens and paths. Add its name to `found` if it had one."""
    clean = places.sub(lambda at: _last_part(at[0]), CREDENTIAL.sub("<token>", text))
    if clean != text:
        found.append(name)
    return clean


def _last_part(path: str) -> str:
    """Return the last part of a path, or `.` for the user's home, whose name is private."""
    path = path.removeprefix("file://").rstrip("/\\") or path
    return "." if Path(path) == Path.home() else ntpath.basename(path) or path
