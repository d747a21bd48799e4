"""The sections of a model card, each from a run's facts to markdown, and empty where there is nothing to say."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from typing import Any

from hf_guidance.config import GuidanceConfig
from hf_guidance.markdown import code, count, escape, table

Facts = dict[str, Any]
PAPER = "https://arxiv.org/abs/2410.20035"
HUB = "https://huggingface.co"  # and not the endpoint of this machine
CITATION = """@inproceedings{subramaniam2025guidance,
  title     = {Training the Untrainable: Introducing Inductive Bias via Representational Alignment},
  author    = {Subramaniam, Vighnesh and Mayo, David and Conwell, Colin and Poggio, Tomaso and
               Katz, Boris and Cheung, Brian and Barbu, Andrei},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025}
}"""
WIDTH = 60  # of a line of the command, after which the next flag starts another
SEEN = {
    "batch": "what the target saw",
    "noise": "noise",
    "prealign_noise": "noise while pre-aligning, then what the target saw",
    "shuffled": "another row's input (a control)",
}
SCHEDULES = {"constant": "constant", "linear": "linear decay", "cosine": "cosine decay"}


def summary(facts: Facts) -> str:
    """What this is, in two sentences."""
    target, guide = facts["target"], facts.get("guide")
    data = f" on {escape(facts['data']['name'])}" if facts.get("data", {}).get("name") else ""
    text = f"{_a(target['architecture'])} with {count(target['parameters'])} parameters, trained for "
    steps = facts["training"]["steps"]
    text += f"{steps} step{'s' if steps != 1 else ''}{data}"
    if not guide:
        return text + "."
    kind = "that kept its random weights" if guide["untrained"] else "that had been trained before"
    if guide["untrained"] is None:
        kind = "of the user's own"
    name = f"{escape(guide['timm'])} of timm" if guide.get("timm") else escape(guide["architecture"])
    text += f" and steered by [guidance]({PAPER}): a frozen {name} {kind} stood beside it, and "
    text += "each pair of layers, one of either network, added one minus its similarity to the loss. The guide is not "
    return text + "needed to use the network and is not kept with it."


def _a(name: str) -> str:
    spelt = name[:2].isupper() or name[1:2].isdigit()  # an RNN, a GPT2, an Albert
    return ("An " if name[:1] in ("AEFHILMNORSX" if spelt else "AEIO") else "A ") + escape(name)


def networks(facts: Facts) -> str:
    """Target and guide side by side."""
    sides = [facts["target"], *([facts["guide"]] if facts.get("guide") else [])]
    names = (f"{side['timm']} of timm" if side.get("timm") else side["architecture"] for side in sides)
    rows: list[list[Any]] = [["architecture", *names]]
    rows.append(["parameters", *(count(side["parameters"]) for side in sides)])
    rows.append(["weights before training", *(_origin(side) for side in sides)])
    if any(side.get("sizes") for side in sides):
        rows.append(
            ["sizes", *(", ".join(f"{k} {v}" for k, v in (side.get("sizes") or {}).items()) or "–" for side in sides)]
        )
    return table(["", "target", "guide"][: len(sides) + 1], rows)


def _origin(side: Facts) -> str:
    if side.get("untrained"):
        return f"random, seed {side['seed']}"
    if side.get("untrained") is False and not side.get("revision"):
        return f"trained, from a folder called {side['source']}"
    source = side.get("source") or ("a module of the user's own" if "fingerprint" in side else "as the user gave them")
    return source + (f" at {side['revision']}" if side.get("revision") else "")


def guide(facts: Facts) -> str:
    """What tells the guide from any other, and how to have it again."""
    own = facts.get("guide")
    if not own:
        return ""
    text = f"Fingerprint of the guide's weights: `{own['fingerprint']}`."
    if on_the_hub(own):
        text = f"The guide is [{escape(own['source'])}]({HUB}/{own['source']}/tree/{own['revision']}). " + text
    can_be_had = bool(own.get("config")) if own["untrained"] else on_the_hub(own)
    if facts.get("repository") and can_be_had:
        text += f' `hf_guidance.load_guide_of("{facts["repository"]}")` '
        text += "builds the same again from its seed." if own["untrained"] else "loads it from there."
    return text


def on_the_hub(own: Facts) -> bool:
    """Whether a guide was loaded from the Hub: only then is its commit known."""
    return bool(own.get("source") and own.get("revision"))


def guidance(facts: Facts) -> str:
    """The settings of the guidance."""
    if not facts.get("guide"):
        return ""
    config = GuidanceConfig.from_dict(facts["guidance"])
    schedule = SCHEDULES[config.guidance_schedule]
    if config.prealign_steps:
        schedule = f"{config.prealign_steps} steps of pre-alignment, then {schedule}"
    if config.guidance_stop_step is not None:
        schedule += f", ending at step {config.guidance_stop_step}"
    one = "a row of the batch, its positions flattened"
    if config.sample_axis == "token":
        one = f"a token, at most {config.max_tokens} of a batch"
    rows = [
        ["similarity", config.measure],
        ["weight", f"{config.guidance_weight:g}, on the {config.guidance_reduction} over the pairs"],
        ["schedule", schedule],
        ["one sample", one],
        ["the guide saw", SEEN[config.guide_input]],
    ]
    rows += _not_default(config)
    if facts["guide"].get("batch_norm"):
        rows.append(["the guide's batch norm", config.guide_batch_norm])
    return table(["guidance", ""], rows)


def _not_default(config: GuidanceConfig) -> list[list[str]]:
    """Rows of the settings that most runs leave alone."""
    every, mapping = config.guidance_every, config.layer_mapping
    rows = {
        "guided at": f"one optimizer step in {every}" if every > 1 else None,
        "similarity over": "the batches of all processes as one" if config.similarity_batch == "global" else None,
        "sketch": f"wider layers cut to {config.sketch} numbers a sample" if config.sketch is not None else None,
        "layers paired": mapping if mapping != "even" else None,
    }
    if config.layer_pairs is not None:
        rows["layers paired"] = f"one by one: {', '.join(config.layer_pairs)}"
    return [[name, value] for name, value in rows.items() if value is not None]


def _in_order(row: Facts) -> list[tuple[int, str]]:
    """A key that sorts layer 9 before layer 10; logs are sorted letter by letter."""
    parts = re.split(r"(\d+)", f"{row['target']}~{row['guide']}")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def pairs(facts: Facts) -> str:
    """Similarity of each pair of layers before and after."""
    found = facts.get("pairs")
    if not found:
        return ""
    first, last = _span(0, found["first"]), _span(found["before_last"], found["last"])
    header = ["target layer", "guide layer", f"similarity, {first}", last]
    rows = [
        [p["target"], p["guide"], shown(p["first"], 3), shown(p["last"], 3)]
        for p in sorted(found["rows"], key=_in_order)
    ]
    return table(header, rows)


def _span(before: int, step: int) -> str:
    return f"step {step}" if step - before == 1 else f"mean over steps {before + 1}–{step}"


def shown(value: float, digits: int) -> str:
    """A number as a card shows it."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite (the run diverged)"


def results(facts: Facts) -> str:
    """This network's own metrics."""
    own = facts.get("results")
    if not own:
        return ""
    rows = [[name.replace("_", " "), shown(value, 4)] for name, value in own["values"].items()]
    text = table(["metric", f"{own['split']} data"], rows)
    if own.get("best_step") is not None:
        text += f"\n\nThe weights are those of step {own['best_step']}, the best of the run, and so are these values."
    return text


def comparison(facts: Facts) -> str:
    """The runs this one is matched with."""
    own = facts.get("comparison")
    return f"{escape(own['text'])}\n\n{own['table']}" if own else ""


def figures(facts: Facts) -> list[str]:
    return [f"![{escape(figure['caption'])}]({figure['file']})" for figure in facts.get("figures", [])]


def rows_of(name: str) -> Callable[[Facts], str]:
    """A section that is a table of one part of the facts."""

    def part(facts: Facts) -> str:
        rows = [[k.replace("_", " "), v] for k, v in facts.get(name, {}).items() if v is not None and k != "id"]
        return table([name, ""], rows) if rows else ""

    return part


def limitations(facts: Facts) -> str:
    text = f"A network for the study of training, not for use: {_learnt(facts)}, "
    text += "and was tested on no other. " if facts.get("results") else "and was not tested. "
    if facts.get("guide"):
        text += "What of the guide's behaviour it has taken on beside the similarity was not measured. "
    seeds = facts.get("comparison", {}).get("seeds")
    return text + (f"The figures are of {seeds} seed{'s' if seeds > 1 else ''}." if seeds else "One seed.")


def _learnt(facts: Facts) -> str:
    data = "the data above" if facts.get("data") else "data that are not named here"
    if facts["target"].get("untrained"):
        return f"it has learnt from {data}" + (" and from nothing else" if facts.get("data") else "")
    if facts["target"].get("source"):
        return f"its weights had been trained before, and it has learnt from {data} as well"
    return f"it has learnt from {data}, and what its weights had learnt before is not known here"


def versions(facts: Facts) -> str:
    return "Made with " + ", ".join(f"{escape(k)} {escape(v)}" for k, v in facts["versions"].items()) + "."


def command(facts: Facts) -> str:
    """The exact command, broken between its flags so that a page shows all of it."""
    if not facts.get("command"):
        return ""
    lines = [""]
    for word in shlex.split(facts["command"]):
        word = shlex.quote(word)
        if word.startswith("--") and len(lines[-1]) > WIDTH:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return code("sh", " \\\n".join(lines))


def citation(facts: Facts) -> str:
    """Of the paper, and of the guide where it is somebody's on the Hub."""
    own = facts.get("guide") or {}
    if not on_the_hub(own):
        return CITATION
    lines = [f"  title        = {{{own['source']}}},", f"  howpublished = {{{HUB}/{own['source']}}},"]
    lines.append(f"  note         = {{revision {own['revision']}}}")
    return "\n".join([CITATION, "", "@misc{guide,", *lines, "}"])
