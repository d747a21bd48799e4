"""Checks of any model card."""

import getpass
import math
import os
import re

import yaml

FRONT = re.compile(r"---\n(.*?)---\n(.*)", re.DOTALL)
# what stands outside of code has none of these
EMPTY_HEADING = re.compile(r"^#+ [^\n]*\s*(?=^#|\Z)", re.MULTILINE)
GAPS = re.compile(r"\b(None|nan|inf|True|False)\b|\{\{|\}\}|\{%|\| +\| +\|$|\(\)|  +\n", re.MULTILINE)
PATH = re.compile(r"(?<![\w:/.<])/(home|root|tmp|work|Users|mnt|var|private)\b|file://|[A-Z]:\\")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def machine():
    """A pattern of this machine's name, as a word of its own."""
    return rf"(?<![\w-]){re.escape(os.uname().nodename)}(?![\w-])"


def gaps_of(value):
    """Yield the values that stand for nothing in metadata: nulls, empty ones, and numbers that are none."""
    if value is None or value in ("", [], {}, "None", "nan") or (isinstance(value, float) and not math.isfinite(value)):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from gaps_of(part)


def check_card(text):
    """Assert that a card has no gap and nothing of this machine, and return its metadata and its body."""
    front, body = FRONT.fullmatch(text).groups()
    prose = re.sub(r"^(```+).*?^\1$|`[^`\n]+`", "", body, flags=re.MULTILINE | re.DOTALL)
    assert not EMPTY_HEADING.search(body.replace("```", "")), text
    found = GAPS.search(prose)
    assert not found, (found, text)
    for pattern in (PATH, TOKEN, re.compile(rf"\b{re.escape(getpass.getuser())}\b")):
        assert not pattern.search(text), (pattern, text)
    assert not re.search(machine(), text), (machine(), text)
    assert body.count("\n# ") == 1
    assert re.search(r"^## Citation\n\n```bibtex\n@inproceedings\{subramaniam2025guidance,", body, re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):  # a `|` in a cell is escaped
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    metadata = yaml.safe_load(front)
    assert not list(gaps_of(metadata)), front
    assert metadata["library_name"] == "transformers"
    assert metadata["tags"][0] == "hf_guidance"
    return metadata, body
