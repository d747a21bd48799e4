"""The cost of guidance as tables and a figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hf_guidance.experiments.cost.ratios import KINDS
from hf_guidance.experiments.report import aligned

MEBI = 2**20
PROCESSES = (2, 8, 64)
MARKERS = "os^Dv"


def cost_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Format tables of times, of memory and throughput, and of arithmetic if it was counted.

    Args:
        rows: Results of `measure_cost`, each with a `name` and a `goal` for its overhead, or None.
    """
    tables = [
        "Seconds a step (median); overhead = guided / (plain + guide forward), from medians, from minima, and the mean "
        "of the rounds'\nwith its standard error:",
        aligned([_time_header(rows), *(_times(row, _has_goal(rows)) for row in rows)]),
        "Samples a second, and peak memory in MiB; the bound is 1.05 (plain + guide's weights + its largest layer):",
        aligned([_memory_header(rows), *(_memory(row) for row in rows)]),
    ]
    if busy := [row for row in rows if "busy" in row]:
        names = [name for name in ("plain", "guide", "guided", "paper") if name in busy[0]["busy"]]
        tables += [
            "Seconds that the GPU is at work in a step, without its waits for the CPU:",
            aligned([["setting", *names, "overhead"], *(_busy(row, names) for row in busy)]),
        ]
    kinds = ("exact", f"--sketch {rows[0]['global_bytes']['sketch']}")
    tables += [
        "MiB that each process receives from all others in a step with --similarity_batch global:",
        aligned([["setting", *(f"{kind}, {n} processes" for kind in kinds for n in PROCESSES)], *map(_received, rows)]),
    ]
    counted = [row for row in rows if "arithmetic" in row]
    if counted:
        header = ["setting", "floor", "Grams", "measured floor", "measured Grams and backward"]
        header += ["products alone", "overhead of these"]
        tables += [
            "Seconds of products and convolutions alone, at the measured rate of large products; of Grams and backward "
            "as measured;\nand of their products alone, as fast as they were in the best of some runs of nothing else:",
            aligned([header, *(_arithmetic(row) for row in counted)]),
        ]
    return "\n\n".join(tables)


def _busy(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    seconds = row["busy"]
    return [row["name"], *(f"{seconds[name]:.4f}" for name in names), f"{seconds['overhead']:.3f}"]


def _received(row: dict[str, Any]) -> list[str]:
    sent = (row["global_bytes"][name] for name in ("exact", "sketched"))
    return [row["name"], *("–" if b is None else f"{b * (n - 1) / MEBI:.1f}" for b in sent for n in PROCESSES)]


def _has_paper(rows: Sequence[dict[str, Any]]) -> bool:
    return any("paper" in row for row in rows)


def _time_header(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = ["setting", "plain", "guide forward", "Grams and measures", "extra backward", "guided"]
    header += ["overhead", "of minima", "of rounds", "guided / plain"]
    header += ["paper's overhead", "paper's / plain"] if _has_paper(rows) else []
    return header + (["goal"] if _has_goal(rows) else [])


def _has_goal(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["goal"] for row in rows)


def _times(row: dict[str, Any], with_goal: bool) -> list[str]:
    split = row["split"]
    seconds = [row["plain"]["median"], *split.values(), row["guided"]["median"]]
    overhead = [*(f"{row['overhead'][kind]:.3f}" for kind in KINDS), _of_rounds(row["overhead_of_rounds"])]
    ratios = [row["guided_over_plain"]["median"]]
    if "paper" in row:
        ratios += [row["paper_overhead"]["median"], row["paper_over_plain"]["median"]]
    goal = [f"≤ {row['goal']:.2f}" if row["goal"] else "–"] if with_goal else []
    return [row["name"], *(f"{x:.4f}" for x in seconds), *overhead, *(f"{x:.3f}" for x in ratios), *goal]


def _of_rounds(overhead: dict[str, Any]) -> str:
    error = overhead["standard_error"]
    return f"{overhead['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _memory_header(rows: Sequence[dict[str, Any]]) -> list[str]:
    paper = ["paper's"] if _has_paper(rows) else []
    rate = [f"{name} /s" for name in ("plain", "guided", *paper)]
    return ["setting", *rate, *(f"{name} MiB" for name in ("plain", "guide", "guided", *paper)), "bound MiB"]


def _memory(row: dict[str, Any]) -> list[str]:
    rates = [f"{row[name]['samples_per_second']:.1f}" for name in ("plain", "guided", "paper") if name in row]
    memory = row["memory"]
    held = [*memory["peak"].values(), bound := memory["plain_guide_layer_5_percent"]]
    cells = ["–" if value is None else f"{value / MEBI:.0f}" for value in held]
    if bound is not None and memory["peak"]["guided"] > bound:
        cells[-1] += " (exceeded)"
    return [row["name"], *rates, *cells]


def _arithmetic(row: dict[str, Any]) -> list[str]:
    found, split = row["arithmetic"], row["split"]
    measured = [row["floor"]["median"], split["grams_and_measures"] + split["extra_backward"]]
    seconds = [f"{value:.4f}" for value in (found["floor_seconds"], found["grams_seconds"], *measured)]
    products = found["products_seconds"]
    alone = ["–", "–"] if products is None else [f"{products:.4f}", f"{1 + products / row['floor']['median']:.3f}"]
    return [row["name"], *seconds, *alone]


def plot_overhead(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw overhead against batch size, with the paper's formulation if it was measured, and save the figure.

    Args:
        rows: As in `cost_tables`, with `batch_size`; each `image_size` and `width` gives a line.
        path: Where to save the figure; the suffix decides the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    panel = figure.subplots()
    ordered = sorted(rows, key=lambda row: row["batch_size"])
    kinds = list(dict.fromkeys((row.get("image_size"), row.get("width")) for row in rows))
    for key, label, color in (("overhead", "guided", "C0"), ("paper_overhead", "paper's formulation", "C1")):
        for number, kind in enumerate(kinds):
            of_kind = [row for row in ordered if key in row and (row.get("image_size"), row.get("width")) == kind]
            if points := [(row["batch_size"], row[key]["median"]) for row in of_kind]:
                of = f", {' / '.join(str(size) for size in kind if size is not None)}" if len(kinds) > 1 else ""
                marker = MARKERS[number % len(MARKERS)]
                panel.plot(*zip(*points, strict=True), marker=marker, color=color, label=label + of)
    panel.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    floor = "(plain step + guide forward)" if any(row["guide_forwards"] for row in rows) else "plain step"
    panel.set(xlabel="batch size", ylabel=f"step / {floor}", xscale="log")
    sizes = list(dict.fromkeys(row["batch_size"] for row in ordered))
    panel.set_xticks(sizes, list(map(str, sizes)))
    panel.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
