"""Card sections on target, guide and guidance: functions from a run's facts to markdown, empty without facts."""

from __future__ import annotations

import re
from typing import Any

from hf_guidance.card.contents import Network, PairRow, RunFacts, Values
from hf_guidance.card.markdown import count, escape, shown, table
from hf_guidance.config import GuidanceConfig

PAPER = "https://arxiv.org/abs/2410.20035"
HUB = "https://huggingface.co"  # not the endpoint that this machine uses
SEEN = {
    "batch": "what the target saw",
    "noise": "noise",
    "prealign_noise": "noise while pre-aligning, then what the target saw",
    "shuffled": "another row's input (a control)",
}
BATCHES = {
    "global": "the batches of all processes as one",
    "accumulated": "all micro-batches of an optimizer step as one",
}
SCHEDULES = {"constant": "constant", "linear": "linear decay", "cosine": "cosine decay"}
OTHER_NAMES = {
    "n embd": "hidden size",
    "n layer": "num hidden layers",
    "n head": "num attention heads",
}  # GPT-2's config has both names


def _once(sizes: Values) -> list[tuple[str, Any]]:
    """Keep one name for each size, if a config has two for the same size."""
    return [(name, value) for name, value in sizes.items() if sizes.get(OTHER_NAMES.get(name, "")) != value]


def summary(facts: RunFacts) -> str:
    """Summarise the target in two sentences."""
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
    spelt = name[:2].isupper() or name[1:2].isdigit()  # "an RNN", "a GPT2", "an Albert"
    return ("An " if name[:1] in ("AEFHILMNORSX" if spelt else "AEIO") else "A ") + escape(name)


def networks(facts: RunFacts) -> str:
    """Compare target and guide in a table."""
    sides = [facts["target"], *([facts["guide"]] if facts.get("guide") else [])]
    names = (f"{side['timm']} of timm" if side.get("timm") else side["architecture"] for side in sides)
    rows: list[list[Any]] = [["architecture", *names]]
    rows.append(["parameters", *(count(side["parameters"]) for side in sides)])
    rows.append(["weights before training", *(_origin(side) for side in sides)])
    if any(side.get("sizes") for side in sides):
        rows.append(
            ["sizes", *(", ".join(f"{k} {v}" for k, v in _once(side.get("sizes") or {})) or "–" for side in sides)]
        )
    return table(["", "target", "guide"][: len(sides) + 1], rows)


def _origin(side: Network) -> str:
    if side.get("untrained"):
        return f"random, seed {side['seed']}"
    if side.get("untrained") is False and not side.get("revision"):
        return f"trained, from a folder called {side['source']}"
    source = side.get("source") or ("a module of the user's own" if "fingerprint" in side else "as the user gave them")
    return source + (f" at {side['revision']}" if side.get("revision") else "")


def guide(facts: RunFacts) -> str:
    """Identify the guide, and tell how to load it again."""
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


def on_the_hub(own: Network) -> bool:
    """Tell whether a guide was loaded from the Hub. Only then is its commit known."""
    return bool(own.get("source") and own.get("revision"))


def guidance(facts: RunFacts) -> str:
    """List the settings of the guidance."""
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
    """List the settings that most runs leave at their default."""
    every, mapping = config.guidance_every, config.layer_mapping
    rows = {
        "guided at": f"one optimizer step in {every}" if every > 1 else None,
        "similarity over": BATCHES.get(config.similarity_batch),
        "sketch": f"wider layers cut to {config.sketch} numbers a sample" if config.sketch is not None else None,
        "layers paired": mapping if mapping != "even" else None,
    }
    if config.layer_pairs is not None:
        rows["layers paired"] = f"one by one: {', '.join(config.layer_pairs)}"
    return [[name, value] for name, value in rows.items() if value is not None]


def pairs(facts: RunFacts) -> str:
    """Tabulate the similarity of each pair of layers, before and after training."""
    found = facts.get("pairs")
    if not found:
        return ""
    first, last = _span(0, found["first"]), _span(found["before_last"], found["last"])
    header = ["target layer", "guide layer", f"similarity in training, {first}", last]
    rows = [
        [p["target"], p["guide"], *("–" if value is None else shown(value, 3) for value in (p["first"], p["last"]))]
        for p in sorted(found["rows"], key=_in_order)
    ]
    note = "\n\n–: LayerDrop skipped the target layer in all of these steps." if any("–" in row for row in rows) else ""
    return table(header, rows) + note


def _in_order(row: PairRow) -> list[tuple[int, str]]:
    """Return a key that sorts layer 9 before layer 10. Logs are sorted alphabetically."""
    parts = re.split(r"(\d+)", f"{row['target']}~{row['guide']}")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _span(before: int, step: int) -> str:
    return f"step {step}" if step - before == 1 else f"mean over steps {before + 1}–{step}"
