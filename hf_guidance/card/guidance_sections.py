"""Tables of a card on target, guide and guidance: functions from a run's facts to markdown, empty without facts."""

from __future__ import annotations

import re
from typing import Any

from hf_guidance.card.contents import Network, PairRow, RunFacts, Values
from hf_guidance.card.facts import HUB_ID
from hf_guidance.card.markdown import count, shown, table
from hf_guidance.config import GuidanceConfig
from hf_guidance.mapping import pair_weight

COMMIT = re.compile("[0-9a-f]+")
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


def article(name: str) -> str:
    """Return the indefinite article of a class name: an RNN, a GPT2, an Albert."""
    spelt = name[:2].isupper() or name[1:2].isdigit()
    return "An" if name[:1] in ("AEFHILMNORSX" if spelt else "AEIO") else "A"


def network_name(side: Network) -> str:
    """Return the name of a network's architecture; that of timm if it is behind transformers' wrapper."""
    return f"{side['timm']} of timm" if side.get("timm") else side["architecture"]


def networks(facts: RunFacts) -> str:
    """Compare target and guide in a table."""
    sides = [facts["target"], *([facts["guide"]] if facts.get("guide") else [])]
    rows: list[list[Any]] = [["architecture", *map(network_name, sides)]]
    rows.append(["parameters", *(count(side["parameters"]) for side in sides)])
    rows.append(["weights before training", *(_origin(side) for side in sides)])
    if any(side.get("sizes") for side in sides):
        rows.append(
            ["sizes", *(", ".join(f"{k} {v}" for k, v in _once(side.get("sizes") or {})) or "–" for side in sides)]
        )
    return table(["", "target", "guide"][: len(sides) + 1], rows)


def _origin(side: Network) -> str:
    if side.get("own_base"):
        place = f": {side['source']}" if side.get("source") else ""
        return f"the target's own without its adapters{place}" + _at(side)
    if side.get("untrained"):
        return f"random, seed {side['seed']}"
    if side.get("untrained") is False and not side.get("revision"):
        return f"trained, from a folder called {side['source']}"
    source = side.get("source") or ("a module of the user's own" if "fingerprint" in side else "as the user gave them")
    return source + _at(side)


def _at(side: Network) -> str:
    return f" at {side['revision']}" if side.get("revision") else ""


def on_the_hub(facts: RunFacts) -> bool:
    """Tell whether the guide was loaded from the Hub. Only then is its commit known."""
    own = facts.get("guide", {})
    return bool(HUB_ID.fullmatch(own.get("source") or "") and COMMIT.fullmatch(own.get("revision") or ""))


def guidance(facts: RunFacts) -> str:
    """List the settings of the guidance."""
    if not facts.get("guide"):
        return ""
    config = GuidanceConfig.from_dict(facts["guidance"])
    schedule = SCHEDULES[config.guidance_schedule]
    if config.guidance_warmup_steps:
        schedule = f"linear warm-up over {config.guidance_warmup_steps} steps, then {schedule}"
    if config.prealign_steps:
        schedule = f"{config.prealign_steps} steps of pre-alignment, then {schedule}"
    if config.guidance_stop_step is not None:
        schedule += f", ending at step {config.guidance_stop_step}"
    if config.guidance_stop_similarity is not None:
        schedule += f", ending at a mean similarity of {config.guidance_stop_similarity:g}: "
        stopped_at = facts.get("stopped_at")
        schedule += "not reached" if stopped_at is None else f"reached at step {stopped_at}"
    one = "a row of the batch, its positions flattened"
    if config.sample_axis == "token":
        one = f"a token, at most {config.max_tokens} of a batch"
    weighted = "weighted " if any(pair_weight(text) != 1 for text in config.layer_pairs or ()) else ""
    rows = [
        ["similarity", config.measure],
        ["weight", f"{config.guidance_weight:g}, on the {weighted}{config.guidance_reduction} over the pairs"],
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
    columns = ["first", "last"]
    if any(row.get("debiased") is not None for row in found["rows"]):
        header.append("debiased CKA then")
        columns.append("debiased")
    rows = []
    for pair in sorted(found["rows"], key=_in_order):
        values: list[Any] = [pair.get(name) for name in columns]
        rows.append([pair["target"], pair["guide"], *("–" if v is None else shown(v, 3) for v in values)])
    return table(header, rows)


def a_layer_was_skipped(facts: RunFacts) -> bool:
    """Tell whether a pair has no similarity in the first or the last log."""
    found = facts.get("pairs")
    return found is not None and any(None in (row["first"], row["last"]) for row in found["rows"])


def _in_order(row: PairRow) -> list[tuple[int, str]]:
    """Return a key that sorts layer 9 before layer 10. Logs are sorted alphabetically."""
    parts = re.split(r"(\d+)", f"{row['target']}~{row['guide']}")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _span(before: int, step: int) -> str:
    return f"step {step}" if step - before == 1 else f"mean over steps {before + 1}–{step}"
