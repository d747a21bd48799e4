"""Markdown that shows any text unchanged."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from hf_guidance.config import Json

# sequences that colour or move a terminal's text, and any single control
CONTROLS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
# addresses and mentions, which are made links without any sign around them
LINKS = re.compile(r"(?<=\w:)(?=//)|(?<=www)(?=\.)|(?<=@)(?=\w)", re.IGNORECASE)


def printable(text: str) -> str:
    """Remove what does not show itself: escape sequences, controls, and marks that turn the direction of a text."""
    text = CONTROLS.sub("", text)
    return "".join(sign for sign in text if sign in "\n\t" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs"))


def escape(text: Json) -> str:
    """Escape a text, so that markdown and HTML show it unchanged, in a table cell too, and make no link of it."""
    text = re.sub(r"\s+", " ", printable(str(text))).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return LINKS.sub("<!-- -->", re.sub(r"([\\`*_\[\]|#~{}$])", r"\\\1", text))


def table(header: Sequence[str], rows: Iterable[Sequence[Json]]) -> str:
    """Format a markdown table. Cells are escaped."""
    lines = [[escape(cell) for cell in line] for line in [header, *rows]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def code(language: str, text: str) -> str:
    """Format a code block. Its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def count(number: int) -> str:
    """Format 1234567 as 1,234,567."""
    return f"{number:,}"


def shown(value: float, digits: int) -> str:
    """Format a number as cards show it.

    Args:
        value: Number; a note replaces one that is not finite.
        digits: Digits after the decimal point.
    """
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite (the run diverged)"
