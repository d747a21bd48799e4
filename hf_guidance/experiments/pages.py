"""Tables on the pages of the recipes, made of the results that are committed.

    python -m hf_guidance.experiments.pages recipes/results README.md recipes/README.md recipes/LOG.md

The command above (`make results`) writes every block between `<!-- NAME -->` and `<!-- end -->` anew: `claims` is the
table of the paper's claims, `controls` that of controls and measures beside two of them, `which_prior` that of targets
by guides, any other name is that of a results file. The table of controls is drawn too, as controls.png beside the
results. Of runs beside a claim only the values are kept, without curves, maps and cards:

    python -m hf_guidance.experiments.pages --only_values outputs/claims/NAME/results.json recipes/results/NAME.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.history import run_in_words
from hf_guidance.experiments.files import read_json, write_json
from hf_guidance.experiments.matrix import matrix_table
from hf_guidance.experiments.report import Report, aligned, comparison_rows
from hf_guidance.experiments.results_page import block_of
from hf_guidance.experiments.verdicts import EQUAL_TIME, Difference, holm

BLOCK = re.compile(r"(<!-- (\w[\w-]*) -->\n).*?(<!-- end -->)", re.DOTALL)
LARGEST_P = 0.05
VALUES = {
    "run",
    "seed",
    "steps",
    "parameters",
    "target",
    "guide",
    "settings",
    "environment",
    "validation",
    "test",
    "seconds",
}
CELLS = Path("recipes/results/matrix/which_prior.json")
OF_CONTROLS = ("controls", "variants", "measures")  # results files beside a claim
BESIDE = {  # claims beside which others were tried, and the titles of these
    "copy_paste": "copy-paste, untrained Transformer",
    "deep_fcn": "deep FCN, trained ResNet",
}


class Claim(NamedTuple):
    """A claim of the paper, and the run of a results file that it is about.

    Source of the figures: Subramaniam et al., NeurIPS 2025 (arXiv 2410.20035).
    """

    words: str
    results: str
    run: str
    paper: str


CLAIMS = (
    Claim("an RNN copies, guided by an untrained Transformer", "copy_paste", "untrained_guide", "14.35 → 42.56 %"),
    Claim(
        "the same, by a weight that falls to 0 within a third",
        "copy_paste_decayed",
        "untrained_guide_decayed",
        "–",
    ),
    Claim("a Transformer learns parity, guided by a trained RNN", "parity", "trained_guide", "71.98 → 78.49 %"),
    Claim(
        "an RNN models language, guided by a trained Transformer",
        "language_modeling",
        "trained_guide",
        "perplexity 69.19 → 40.01",
    ),
    Claim("the same, by an untrained one", "language_modeling", "untrained_guide", "perplexity 69.19 → 59.61"),
    Claim(
        "a deep FCN on images, guided by an untrained ResNet", "deep_fcn", "untrained_guide", "top 5: 1.65 → 13.10 %"
    ),
    Claim("the same, by a trained one", "deep_fcn", "trained_guide", "top 5: 1.65 → 7.50 %"),
    Claim("a wide FCN, guided by a trained ResNet", "wide_fcn", "trained_guide", "top 5: 34.09 → 43.01 %"),
    Claim(
        "a ConvNet without skips, guided by one with skips",
        "convnet_without_skips",
        "trained_guide",
        "top 5: 70.02 → 78.91 %",
    ),
)


def claims_table(reports: Mapping[str, Report]) -> str:
    """Format the claims that have results as a Markdown table, with Holm's adjustment over them.

    Args:
        reports: Name of a results file → its content.
    """
    done = [claim for claim in CLAIMS if claim.results in reports]
    found = {
        (claim, baseline): _difference(reports[claim.results], claim.run, baseline)
        for claim in done
        for baseline in ("alone", EQUAL_TIME)
    }
    adjusted: dict[tuple[Claim, str], float] = {}
    for baseline in ("alone", EQUAL_TIME):
        p_values = {claim.words: 1.0 if (p := found[claim, baseline]["p"]) is None else p for claim in done}
        adjusted |= {(claim, baseline): p for claim, p in zip(done, holm(p_values).values(), strict=True)}
    lines = [["claim", "paper", "alone → guided, test", "gain at equal steps", "gain at equal time"]]
    for claim in done:
        cells = [_cell(found[claim, baseline], adjusted[claim, baseline]) for baseline in ("alone", EQUAL_TIME)]
        lines.append([claim.words, claim.paper, _means(reports[claim.results], claim.run), *cells])
    return aligned(lines)


def _difference(report: Report, run: str, baseline: str) -> Difference:
    return next(d for d in report["differences"] if (d["run"], d["baseline"]) == (run, baseline))


def _cell(found: Difference, adjusted: float) -> str:
    """Write a gain with its interval and verdict, in bold where the claim is shown after Holm's adjustment too."""
    gain = f"{found['mean']:+.1f} {found['unit']}"
    if found["interval"] is None:
        return f"{gain}, not shown (too few seeds)"
    low, high = found["interval"]
    gain += f" [{low:+.1f}, {high:+.1f}]"
    if low <= 0:
        return f"{gain}, not shown"
    return f"**{gain}, shown**" if adjusted < LARGEST_P else f"{gain}, shown (not after Holm)"


def _means(report: Report, run: str) -> str:
    metric = report["task"]["metric"]
    rows = {row["run"]: row["test"] for row in comparison_rows(report["runs"], metric=metric)}
    values = [(rows[name] or (float("nan"), None))[0] for name in ("alone", run)]
    return " → ".join(f"{100 * value:.1f} %" if report["task"]["percent"] else f"{value:.1f}" for value in values)


def written_anew(page: str, reports: Mapping[str, Report]) -> str:
    """Return a page with its blocks written anew.

    Raises:
        ValueError: If a block names no results file.
    """

    def block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        tables = {
            "claims": claims_table,
            "controls": controls_table,
            "which_prior": lambda _: matrix_table(read_json(CELLS)),
        }
        if name not in tables and name not in reports:
            raise ValueError(
                f"the page has a block {name!r}, but the results are {', '.join(reports)}: add {name}.json."
            )
        content = f"{tables[name](reports)}\n" if name in tables else block_of(reports[name])
        return f"{begin}{content}{end}"

    return BLOCK.sub(block, page)


def controls_of(reports: Mapping[str, Report]) -> dict[str, dict[str, Difference]]:
    """Collect the gains at equal steps of whatever was tried beside a claim.

    Args:
        reports: Name of a results file → its content.

    Returns:
        Title of a claim → run in words → its gain. Runs of the claim's own guide by several measures are named by the
        measure.
    """
    found: dict[str, dict[str, Difference]] = {}
    for results, title in BESIDE.items():
        for name in (f"{results}_{kind}" for kind in OF_CONTROLS):
            for gain in reports[name]["differences"] if name in reports else []:
                if gain["baseline"] == "alone":
                    measure = gain["run"].partition("-measure_")[2]
                    words = f"by {measure}" if measure else run_in_words(gain["run"])
                    found.setdefault(title, {})[words] = gain
    return found


def controls_table(reports: Mapping[str, Report]) -> str:
    """Format these gains as a Markdown table, a line for each run and a column for each claim."""
    found = controls_of(reports)
    runs = sorted(
        dict.fromkeys(run for gains in found.values() for run in gains), key=lambda run: run.startswith("by ")
    )
    cells = [["run", *found]]
    for run in runs:
        cells.append([run, *(_short(gains[run]) if run in gains else "–" for gains in found.values())])
    return aligned(cells)


def _short(gain: Difference) -> str:
    interval = gain["interval"]
    return f"{gain['mean']:+.1f}" + ("" if interval is None else f" [{interval[0]:+.1f}, {interval[1]:+.1f}]")


def plot_controls(reports: Mapping[str, Report], path: Path) -> None:
    """Draw these gains with their intervals, a panel for each claim, and save the figure."""
    from matplotlib.figure import Figure

    found = controls_of(reports)
    most = max(map(len, found.values()))
    figure = Figure(figsize=(4.6 * len(found), 1.2 + 0.27 * most), layout="constrained")
    for panel, (title, gains) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        panel.axvline(0, color="0.6", linewidth=0.8)
        for place, gain in enumerate(gains.values()):
            low, high = gain["interval"] or (gain["mean"], gain["mean"])
            colour = "C2" if low > 0 else "C3" if high < 0 else "0.4"
            panel.plot([low, high], [place, place], color=colour, linewidth=1.4)
            panel.plot(list(gain["values"].values()), [place] * len(gain["values"]), "|", color=colour, markersize=5)
            panel.plot([gain["mean"]], [place], "o", color=colour, markersize=4)
        panel.set_yticks(range(len(gains)), list(gains), fontsize=7)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("gain over the target alone, points of test accuracy", fontsize=7)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def only_values(report: Report) -> Report:
    """Return a report without the curves, maps and cards of its runs."""
    kept: Any = report | {"runs": [{k: v for k, v in run.items() if k in VALUES} for run in report["runs"]]}
    return kept


def read_results(folder: Path) -> dict[str, Report]:
    """Read the results files of a folder: name → content."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


if __name__ == "__main__":
    if sys.argv[1] == "--only_values":
        write_json(Path(sys.argv[3]), only_values(read_json(Path(sys.argv[2]))))
        sys.exit()
    results = read_results(Path(sys.argv[1]))
    for page in map(Path, sys.argv[2:]):
        page.write_text(written_anew(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    if controls_of(results):
        plot_controls(results, Path(sys.argv[1]) / "controls.png")
    for title, found in results.items():
        minutes = sum(run["seconds"] for run in found["runs"]) / 60
        print(f"{title}: {len(found['runs'])} runs, {minutes:.0f} min of training")
