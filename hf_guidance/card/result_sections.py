"""Card sections on the results of a run and on reproducing it, empty without facts."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from hf_guidance.card.contents import RunFacts
from hf_guidance.card.guidance_sections import HUB, on_the_hub
from hf_guidance.card.markdown import code, escape, shown, table

CITATION = """@inproceedings{subramaniam2025guidance,
  title     = {Training the Untrainable: Introducing Inductive Bias via
               Representational Alignment},
  author    = {Subramaniam, Vighnesh and Mayo, David and Conwell, Colin and Poggio, Tomaso and
               Katz, Boris and Cheung, Brian and Barbu, Andrei},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025}
}"""
CUT = "Arguments other than the known training settings are left out."
WIDTH = 60  # width of a line of the command after which the next flag starts a new line


def results(facts: RunFacts) -> str:
    """Tabulate this network's own metrics."""
    own = facts.get("results")
    if not own:
        return ""
    rows = [[name.replace("_", " "), shown(value, 4)] for name, value in own["values"].items()]
    text = table(["metric", f"{own['split']} data"], rows)
    if own.get("best_step") is not None:
        text += f"\n\nThe weights are those of step {own['best_step']}, the best of the run, and so are these values."
    return text


def comparison(facts: RunFacts) -> str:
    """Show the table of this run and the runs it is matched with."""
    own = facts.get("comparison")
    return f"{escape(own['text'])}\n\n{own['table']}" if own else ""


def figures(facts: RunFacts) -> list[str]:
    return [f"![{escape(figure['caption'])}]({figure['file']})" for figure in facts.get("figures", [])]


def rows_of(name: str) -> Callable[[RunFacts], str]:
    """Make a section that shows one part of the facts as a table."""

    def part(facts: RunFacts) -> str:
        section: Any = facts.get(name, {})
        rows = [[k.replace("_", " "), v] for k, v in section.items() if v is not None and k != "id"]
        return table([name, ""], rows) if rows else ""

    return part


def limitations(facts: RunFacts) -> str:
    text = f"A network for the study of training, not for use: {_learnt(facts)}, "
    text += "and was tested on no other. " if facts.get("results") else "and was not tested. "
    if facts.get("guide"):
        text += "What of the guide's behaviour it has taken on beside the similarity was not measured. "
    seeds = facts.get("comparison", {}).get("seeds")
    return text + (f"The figures are of {seeds} seed{'s' if seeds > 1 else ''}." if seeds else "One seed.")


def _learnt(facts: RunFacts) -> str:
    data = "the data above" if facts.get("data") else "data that are not named here"
    if facts["target"].get("untrained"):
        return f"it has learnt from {data}" + (" and from nothing else" if facts.get("data") else "")
    if facts["target"].get("source"):
        return f"its weights had been trained before, and it has learnt from {data} as well"
    return f"it has learnt from {data}, and what its weights had learnt before is not known here"


def versions(facts: RunFacts) -> str:
    return "Made with " + ", ".join(f"{escape(k)} {escape(v)}" for k, v in facts["versions"].items()) + "."


def command(facts: RunFacts) -> str:
    """Format the command, broken between its flags so that a page shows all of it."""
    if not facts.get("command"):
        return ""
    lines = [""]
    for word in shlex.split(facts["command"]):
        word = shlex.quote(word)
        if word.startswith("--") and len(lines[-1]) > WIDTH:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    text = code("sh", " \\\n".join(lines))
    return f"{text}\n\n{CUT}" if facts.get("command_is_cut") else text


def citation(facts: RunFacts) -> str:
    """Cite the paper, and the guide if it is from the Hub."""
    own = facts.get("guide") or {}
    if not on_the_hub(own):
        return CITATION
    lines = [f"  title        = {{{own['source']}}},", f"  howpublished = {{{HUB}/{own['source']}}},"]
    lines.append(f"  note         = {{revision {own['revision']}}}")
    return "\n".join([CITATION, "", "@misc{guide,", *lines, "}"])
