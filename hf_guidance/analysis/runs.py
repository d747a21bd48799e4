"""Names and colours of runs, alike in all figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_guidance.analysis.history import Curves, run_in_words

BY_MEANING = {  # name of a run → its colour
    "alone": "0.3",
    "alone_equal_time": "0.6",
    "alone_longer": "0.6",
    "alone_shifted": "tab:brown",
    "guide_itself": "tab:green",
    "guided": "tab:blue",
    "untrained_guide": "tab:blue",
    "untrained_guide_stopped": "tab:cyan",
    "trained_guide": "tab:red",
    "trained_guide_stopped": "tab:orange",
    "trained_guide_cached": "tab:pink",
}
OTHERS = ("tab:purple", "tab:olive", "darkblue", "darkgreen", "gold", "crimson", "teal", "sienna", "navy", "orchid")
AFTER_THE_GUIDE = {  # end of a run's name → words
    "shuffled_guide": "that sees other rows",
    "noise_guide": "that sees noise",
    "noncausal_guide": "that sees the whole row",
    "own_architecture": "of its own architecture",
}
AFTER_A_COMMA = {
    "_stopped": "stopped early",
    "_decayed": "decaying",
    "_until_similar": "until similar",
    "_prealigned": "first alone",
    "_on_noise": "first alone on noise",
    "_cached": "in a cache",
    "reversed_layers": "layers reversed",
    "within_rows": "within rows",
    "last_to_early_layer": "last layer to an early one",
}


def label_of(run: Curves) -> str:
    """Write a run for the legend of a figure, such as `guided by an untrained GPT-2` for `untrained_guide`.

    Args:
        run: Record of the run. One without a guide, or without its name, is called by the name of the run.
    """
    name, _, swept = run.get("run", "").partition("-")
    guide: Any = run.get("guide")
    if not guide:
        return run_in_words(run.get("run", ""))
    kind = "an untrained" if guide.get("untrained") else "a trained"
    words = f"guided by {kind} {architecture_of(guide)}"
    words += "".join(f" {said}" for end, said in AFTER_THE_GUIDE.items() if name == end)
    words += "".join(f", {said}" for end, said in AFTER_A_COMMA.items() if name.endswith(end))
    return words + (f", {run_in_words(swept)}" if swept else "")


def architecture_of(guide: Mapping[str, Any]) -> str:
    """Return what people call a guide's architecture, such as `ResNet` or `resnet18`, given its identity."""
    own = guide.get("config") or {}
    if "Timm" in guide["architecture"]:
        return str(own.get("architecture", "network of timm"))
    name = str(guide["architecture"]).removesuffix("Model")
    return {"GPT2": "GPT-2"}.get(name, name)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each run: that of its meaning, or the next free one for runs without one.

    Args:
        names: Names of the runs of a figure.
    """
    free = iter(OTHERS * (1 + len(names) // len(OTHERS)))
    return {name: BY_MEANING.get(name) or next(free) for name in dict.fromkeys(names)}
