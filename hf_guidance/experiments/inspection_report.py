"""An inspection as text for the terminal, and its proposal as YAML."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import yaml

from hf_guidance.analysis.first_batch import MAX_ROWS, LayerLook
from hf_guidance.analysis.first_warnings import LARGE_SHARE, named
from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.measurements import Measurements, Spread

WIDTH = 116
NAMED = 5


def as_yaml(proposal: GuidanceConfig, reasons: Mapping[str, str]) -> str:
    """Write a setting as YAML: the fields that were chosen, each below its reason, and those that differ otherwise.

    Args:
        proposal: The setting.
        reasons: Field → why it has its value.
    """
    values, defaults = proposal.to_dict(), GuidanceConfig().to_dict()
    lines = ["# Settings of guidance, proposed by hf_guidance.experiments.inspect."]
    for name, value in values.items():
        if value is None or (name not in reasons and value == defaults[name]):
            continue
        if name in reasons:
            lines.append(
                textwrap.fill(reasons[name], WIDTH, break_on_hyphens=False, initial_indent="# ", subsequent_indent="# ")
            )
        flow = None if isinstance(value, list) else False  # lists stand on the line of their name
        lines.append(yaml.safe_dump({name: value}, default_flow_style=flow, allow_unicode=True, width=10**6).strip())
    return "\n".join(lines) + "\n"


def as_text(
    networks: tuple[str, str],
    rows: int,
    measured: Measurements,
    warnings: Sequence[str],
    proposal: GuidanceConfig,
    reasons: Mapping[str, str],
) -> str:
    """Write an inspection as text: pairs, layers, gradients and cost of the trainer's setting, then the proposal.

    Args:
        networks: Names of target and guide.
        rows: Rows of a batch.
        measured: Measurements of the trainer's setting.
        warnings: Warnings about it.
        proposal: The setting that is proposed.
        reasons: Field of it → why it has its value.
    """
    config, batches = measured.config, "batch" if measured.batches == 1 else "batches"
    measure, axis = config.resolved_measure(), config.sample_axis
    lines = [
        f"{networks[0]} guided by {networks[1]}, over {measured.batches} {batches} of {rows} rows",
        f"measured with the trainer's setting: {measure}, sample axis {axis}, {measured.samples_in_words()}",
        "",
        *_table(measured, measure),
        "",
        *_layers(measured),
        _gradients(measured),
        _cost(measured),
        *(f"warning: {text}" for text in warnings),
        "",
        "proposal",
    ]
    values = proposal.to_dict()
    for name, reason in reasons.items():
        text = f"{name} = {_value(values[name])}: {reason}"
        lines.append(textwrap.fill(text, WIDTH, break_on_hyphens=False, initial_indent="  ", subsequent_indent="    "))
    if proposal.ridge_penalty is not None:
        lines.append(f"  with ridge_penalty = {proposal.ridge_penalty:g}")
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, list):
        more = f" … {value[-1]} ({len(value)})" if len(value) > NAMED else ""
        return ", ".join(map(str, value[: NAMED if not more else 2])) + more
    return "unset" if value is None else str(value)


def _table(found: Measurements, measure: str) -> list[str]:
    """Write the pairs with the mean and spread of each measure, and the room that the trainer's own leaves."""
    measures = list(found.pairs[0].similarities)
    rows = [["pair", *measures, "room"]]
    for pair in found.pairs:
        own = [_spread(pair.similarities[name]) for name in measures]
        rows.append([f"{pair.target}~{pair.guide}", *own, f"{pair.room(measure):.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    ]
    hidden = len(lines) - 1 - MAX_ROWS
    if hidden > 0:
        first = 1 + MAX_ROWS // 2
        lines[first : first + hidden] = [f"… {hidden} more pairs"]
    return lines


def _spread(value: Spread) -> str:
    return f"{value.mean:.3f}" + ("" if value.deviation is None else f" ± {value.deviation:.3f}")


def _layers(found: Measurements) -> list[str]:
    sides = (("target", found.targets), ("guide", found.guides))
    dead = [f"{side} {name}" for side, layers in sides for name, look in layers.items() if look.is_dead]
    massive = [f"{side} {name} ({100 * share:.0f} %)" for side, name, share in _shares(sides) if share > LARGE_SHARE]
    largest = max((share for _, _, share in _shares(sides)), default=None)
    most = "not measured below 50 samples" if largest is None else f"at most {100 * largest:.0f} %"
    return [
        f"dead layers: {named(dead) or 'none'}",
        f"energy of a layer in 2 % of its samples: {named(massive) or most}",
    ]


def _shares(sides: Sequence[tuple[str, Mapping[str, LayerLook]]]) -> list[tuple[str, str, float]]:
    found = [(side, name, look.top_share) for side, layers in sides for name, look in layers.items()]
    return [(side, name, share) for side, name, share in found if share is not None]


def _gradients(found: Measurements) -> str:
    if found.gradient_ratio is None or found.gradient_cosine is None:
        return f"gradient of guidance over that of the task: not measured ({found.not_measured})"
    angle = math.degrees(math.acos(max(-1.0, min(1.0, found.gradient_cosine.mean))))
    ratio = found.gradient_ratio
    spread = "" if ratio.deviation is None else f" ± {ratio.deviation:.2g}"
    at = f", at an angle of {angle:.0f}°" if ratio.mean else ""
    return f"gradient of guidance over that of the task at weight 1: {ratio.mean:.3g}{spread}{at}"


def _cost(found: Measurements) -> str:
    cost = found.cost
    kind = "CPU time" if cost.device.startswith("cpu") else "time"
    memory = "" if cost.memory is None else f"; peak memory {cost.memory / 2**20:.0f} MiB"
    memory += " held by the process" if memory and cost.device.startswith("cpu") else ""
    return (
        f"{kind} of a step: target {cost.target:.3g} s, guide's forward {cost.guide:.3g} s, guidance "
        f"{cost.guidance:.3g} s{memory}"
    )
