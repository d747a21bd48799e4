"""The model cards of a recipe's guided runs, each with the runs that it is compared with.

    python -m hf_guidance.experiments.cards recipes/results model_cards

The command above writes a card for every guided run of every results file (`make cards`).
"""

from __future__ import annotations

import json
import logging
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from hf_guidance.analysis.curves import plot_comparison, plot_curves
from hf_guidance.analysis.heat_maps import plot_similarity_maps
from hf_guidance.card.contents import RunFacts
from hf_guidance.card.facts import known
from hf_guidance.card.rendering import render
from hf_guidance.experiments.report import Record, Report, comparison_rows, markdown_table
from hf_guidance.experiments.verdicts import EQUAL_TIME, Difference, gains
from hf_guidance.trainer.staging import (
    CARD,
    CURVES,
    STAGING,
    complete,
    files_in,
    make_empty,
    put,
    without_links,
)
from hf_guidance.trainer.uploads import push_staged, upload_command

logger = logging.getLogger(__name__)

LICENSE = "apache-2.0"
AT = {"alone": "at equal steps", EQUAL_TIME: "at equal time"}
FIGURES = {
    CURVES: "This run: task loss, validation, and similarity of every pair over time",
    "comparison.png": "Validation curves, losses, and similarities of all pairs over time",
    "similarity.png": "Similarity of every target layer with every guide layer, before and after training, of rows to "
    "validate with, without dropout",
}


def write_cards(report: Report, folder: Path) -> list[Path]:
    """Write README.md and figures into the folder of each guided run.

    Args:
        report: Content of `results.json`.
        folder: Output folder of the recipe, which holds `seed-<seed>/<run>`.

    Returns:
        The folders written.
    """
    written = []
    for run in report["runs"]:
        place = folder / f"seed-{run['seed']}" / run["run"]
        if "card" in run and place.is_dir():
            for name in FIGURES:
                if (folder / name).is_file():
                    put(folder / name, place / name, link=False)
            without_links(place, (CARD, *FIGURES))
            plot_curves(run, report["task"]["metric"], place / CURVES)
            figures = [name for name in FIGURES if (place / name).is_file()]
            (place / "README.md").write_text(card_of(run, report, figures), encoding="utf-8")
            written.append(place)
    return written


def write_model_cards(results: Path, folder: Path) -> list[Path]:
    """Write a card and figures for the first seed of each kind of guided run, for every results file.

    Returns:
        The folders written: `<folder>/<name of the results>/<run>`.
    """
    written = []
    for path in sorted(results.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        for run in first_guided(report):
            place = folder / path.stem / run["run"]
            place.mkdir(parents=True, exist_ok=True)
            draw(run, report, place)
            (place / "README.md").write_text(model_card_of(run, report, path.stem), encoding="utf-8")
            written.append(place)
    return written


def first_guided(report: Report) -> list[Record]:
    """Select the guided runs of a report that kept facts for a card, one per kind, each of the first seed."""
    return list({run["run"]: run for run in reversed(report["runs"]) if run.get("card")}.values())[::-1]


def facts_of(run: Record, report: Report) -> RunFacts:
    """Return the facts that a run kept for its card, with the two that only its report knows: command and folder.

    Args:
        run: One of the report's runs, with a `card`.
        report: Content of `results.json`. Its command, unlike the run's own, made every run that the card shows.
    """
    own = {name: fact for name, fact in run["card"].items() if not name.startswith("command")}
    started = {"command": report["command"], "command_is_cut": report.get("command_is_cut")}
    found: Any = own | known({"folder": _folder(run, report), **started})
    return found


def _folder(run: Record, report: Report) -> str | None:
    """Return the folder of the network, if the command names its output folder or a claim, which has one."""
    words = shlex.split(report["command"])
    if "--output_dir" not in words and report.get("claim"):
        return f"outputs/claims/{report['claim']}/seed-{run['seed']}/{run['run']}"
    if "--output_dir" not in words[:-1] or Path(words[words.index("--output_dir") + 1]).is_absolute():
        return None
    return f"{words[words.index('--output_dir') + 1]}/seed-{run['seed']}/{run['run']}"


def model_card_of(run: Record, report: Report, title: str) -> str:
    """Return the card of a committed result as Markdown."""
    figures = ["comparison.png", *(["similarity.png"] if run.get("similarity_maps") else [])]
    return card_of(run, report, figures, name=f"{title}-{run['run']}")


def draw(run: Record, report: Report, place: Path) -> None:
    """Draw the figures of a committed result into a folder."""
    metric, percent = report["task"]["metric"], report["task"]["percent"]
    runs = [r for r in report["runs"] if _belongs(r["run"], run) and r["run"] != "alone_longer"]
    plot_comparison(
        runs, metric, place / "comparison.png", percent=percent, log=not percent, chance=report["task"].get("chance")
    )
    plot_similarity_maps([run], place / "similarity.png")


def card_of(run: Record, report: Report, figures: list[str], **given: Any) -> str:
    """Return the card of one run as Markdown, with the comparison that it is part of."""
    metric, percent = report["task"]["metric"], report["task"]["percent"]
    rows = [row for row in comparison_rows(report["runs"], metric=metric) if _belongs(row["run"], run)]
    facts = facts_of(run, report)
    facts |= {
        "cost": _cost(run, report, facts["cost"]),
        "figures": [{"file": name, "caption": FIGURES[name]} for name in figures],
        "comparison": {
            "text": _in_words(run, report),
            "table": markdown_table(rows, metric, percent),
            "seeds": len({r["seed"] for r in report["runs"]}),
        },
    }
    told: Any = facts | given
    return render(told)


def _cost(run: Record, report: Report, known: dict[str, str]) -> dict[str, str]:
    """Combine the times from the comparison with the costs that the run itself reports."""
    kind = "of CPU time" if run["environment"]["device"].startswith("cpu") else "of GPU time"
    alone = [r["seconds"] / r["steps"] for r in report["runs"] if r["run"] == "alone"]
    step = next((name for name in known if name.startswith("a step")), "a step with guidance")  # or on average
    cost = {step: f"{run['seconds'] / run['steps']:.3g} s {kind}"}
    if alone:
        cost["a step without"] = f"{statistics.fmean(alone):.3g} s {kind}"
    cost["all steps"] = f"{run['seconds']:.0f} s {kind}, evaluations left out"
    for guide in report["runs"]:
        if (guide["run"], guide["seed"]) == (run["guide"]["source"], run["seed"]):
            cost["all steps of the guide's own training"] = f"{guide['seconds']:.0f} s {kind}"
    return cost | known


def _in_words(run: Record, report: Report) -> str:
    text = "Matched runs: same seeds, same initial weights, same data order"
    text += "; the learning rate is the best one without guidance." if report["learning_rate_search"] else "."
    several = len({other["seed"] for other in report["runs"]}) > 1
    text += " Mean ± standard deviation over the seeds, at the last step." if several else " Figures of the last step."
    chance = report["task"].get("chance")
    text += "" if chance is None else f" By chance {report['task']['metric']} is {100 * chance:.3g} %."
    for found in gains(report["runs"], report["task"]):
        if found["run"] == run["run"]:
            text += f" Gain over the target alone {AT[found['baseline']]}, test: {_gain(found)}."
    return text


def _gain(found: Difference) -> str:
    """Write a gain with its interval, or with the value of each seed where seeds are too few for one."""
    mean, interval = found["mean"], found["interval"]
    spread = f"95 % interval {interval[0]:+.1f} to {interval[1]:+.1f}, " if interval else ""
    seeds = len(found["values"])
    return f"{mean:+.1f} {found['unit']} ({spread}{seeds} seed{'s' if seeds > 1 else ''})".replace("-", "−")


def _belongs(row: str, run: Record) -> bool:
    """Tell whether a row of the table is about this run: the run, an unguided one, or its guide."""
    return row == run["run"] or row.startswith("alone") or row == run["guide"]["source"]


def push_runs(report: Report, places: list[Path], token: str | None, revision: str | None = None) -> None:
    """Push each run in one commit: the model, if it waits to be pushed, with its card and figures. Print the addresses.

    A failed push is logged with a command to repeat it, and the others go on; nothing is lost.

    Args:
        report: The comparison, with the cards of its runs.
        places: Folder of each run.
        token: Token of the Hub; None for the one of the login.
        revision: Branch to push to.

    Raises:
        ConnectionError: If a push failed, after all others.
    """
    failed = []
    cards = {f"seed-{run['seed']}/{run['run']}": run.get("card", {}) for run in report["runs"]}
    for place in places:
        repository = cards[f"{place.parent.name}/{place.name}"].get("repository")
        if not repository:
            continue
        staged = place / STAGING
        if staged.is_symlink() or not set(files_in(staged)) - {CARD, *FIGURES}:  # the model was pushed before
            make_empty(staged)
        title = "End of training" if files_in(staged) else "Card with the runs it is compared with"
        complete(staged, place, (CARD, *FIGURES))
        try:
            commit = push_staged(staged, repo_id=repository, commit_message=title, token=token, revision=revision)
            print(f"pushed: {commit.repo_url}" + (f", branch {revision}" if revision else ""))
        except Exception as error:
            command = upload_command(str(repository), staged, revision)
            logger.error("%s was not pushed (%s). To push it: %s", repository, error, command)
            failed.append(str(repository))
    if failed:
        raise ConnectionError(f"{', '.join(failed)}: not pushed. The commands to push later are in the errors above.")


if __name__ == "__main__":
    for written_folder in write_model_cards(*map(Path, sys.argv[1:])):
        print(written_folder)
