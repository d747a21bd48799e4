"""Markdown that shows any text as it is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from hf_guidance.config import Json


def escape(text: Json) -> str:
    """Text that shows as it is, in a table cell too: markdown's and HTML's signs lose their meaning."""
    text = re.sub(r"\s+", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~{}])", r"\\\1", text)


def table(header: Sequence[str], rows: Iterable[Sequence[Json]]) -> str:
    """A markdown table; cells are escaped."""
    lines = [[escape(cell) for cell in line] for line in [header, *rows]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def code(language: str, text: str) -> str:
    """A block of code, fenced by more backticks than it holds in a row."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def count(number: int) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,}"


def shown(value: float, digits: int) -> str:
    """A number as a card shows it."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite (the run diverged)"
