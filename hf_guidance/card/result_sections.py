"""Tables of a card on the results of a run, and the command that repeats it; empty without facts."""

from __future__ import annotations

import shlex
from typing import Literal, TypeAlias

from hf_guidance.card.contents import RunFacts
from hf_guidance.card.markdown import code, shown, table

Section: TypeAlias = Literal["training", "cost", "data"]

WIDTH = 60  # width of a line of the command after which the next flag starts a new line


def results(facts: RunFacts) -> str:
    """Tabulate this network's own metrics."""
    own = facts.get("results")
    if not own:
        return ""
    rows = [[name.replace("_", " "), shown(value, 4)] for name, value in own["values"].items()]
    return table(["metric", f"{own['split']} data"], rows)


def values(facts: RunFacts, name: Section) -> str:
    """Tabulate the values of one section as they are."""
    rows = [[k.replace("_", " "), v] for k, v in facts.get(name, {}).items() if v is not None and k != "id"]
    return table([name, ""], rows) if rows else ""


def command_lines(facts: RunFacts) -> str:
    """Format the command, broken between its flags so that a page shows all of it."""
    if not facts.get("command"):
        return ""
    lines = [""]
    for word in shlex.split(facts["command"]):
        word = shlex.quote(word)
        if word.startswith("--") and len(lines[-1]) > WIDTH:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return code("sh", " \\\n".join(lines))
