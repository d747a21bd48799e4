"""The cards of a recipe's guided runs: what each run knows of itself, and the runs it is matched with."""

from __future__ import annotations

import logging
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Any

from hf_guidance.analysis.report import comparison_rows, markdown_table
from hf_guidance.model_card import render
from hf_guidance.publishing import later

logger = logging.getLogger(__name__)

FIGURES = {
    "comparison.png": "Validation curves, losses, and similarities of all pairs over time",
    "similarity.png": "Similarity of every target layer with every guide layer, before and after training",
}


def data_facts(name: str, description: str, data: dict[str, Any]) -> dict[str, Any]:
    """What a card says of the data, from what they were made from."""
    source = data.get("dataset") if not data.get("text_files") else None
    files = [file["name"] for file in data.get("text_files") or ()]
    folder = source.get("name") if isinstance(source, dict) else None
    known = source if isinstance(source, str) and "/" in source else None
    title = folder or known or source or ", ".join(files) or f"{name.replace('_', ' ')} data made on the fly"
    return {"name": title, "task": description, "id": known}


def without_paths(command: list[str]) -> str:
    """A command line whose absolute paths are cut down to their last part."""
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in command])


def write_cards(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write README.md and figures into the folder of each guided run; the folders written."""
    written = []
    for run in report["runs"]:
        place = folder / f"seed-{run['seed']}" / run["run"]
        if "card" in run and place.is_dir():
            figures = [name for name in FIGURES if (folder / name).is_file()]
            for name in figures:
                shutil.copy(folder / name, place / name)
            (place / "README.md").write_text(card_of(run, report, figures), encoding="utf-8")
            written.append(place)
    return written


def card_of(run: dict[str, Any], report: dict[str, Any], figures: list[str]) -> str:
    """The card of one run as markdown, with the comparison it is part of."""
    metric, percent = report["task"]["metric"], report["task"]["percent"]
    rows = [row for row in comparison_rows(report["runs"], metric=metric) if _belongs(row["run"], run["run"])]
    alone = [r["seconds"] / r["steps"] for r in report["runs"] if r["run"] == "alone"]
    cost = {"a step with guidance": f"{run['seconds'] / run['steps']:.3f} s"}
    if alone:
        cost["a step without"] = f"{statistics.fmean(alone):.3f} s"
    text = "Matched runs: same seeds, same initial weights, same data order"
    text += "; the learning rate is the best one without guidance." if report["learning_rate_search"] else "."
    facts = run["card"] | {
        "cost": cost | run["card"].get("cost", {}),
        "figures": [{"file": name, "caption": FIGURES[name]} for name in figures],
        "comparison": {
            "text": text,
            "table": markdown_table(rows, metric, percent),
            "seeds": len({r["seed"] for r in report["runs"]}),
        },
    }
    return render(facts)


def _belongs(row: str, run: str) -> bool:
    return row == run or row.startswith("alone") or row == "guide_itself"


def push_cards(report: dict[str, Any], places: list[Path], token: str | None) -> None:
    """Upload cards and figures to where the runs were pushed; what fails is said, and nothing is lost."""
    from huggingface_hub import HfApi

    cards = {f"seed-{run['seed']}/{run['run']}": run.get("card", {}) for run in report["runs"]}
    for place in places:
        repository = cards[f"{place.parent.name}/{place.name}"].get("repository")
        try:
            if repository:
                HfApi().upload_folder(
                    repo_id=repository,
                    folder_path=place,
                    allow_patterns=["README.md", *FIGURES],
                    commit_message="Card with the runs it is compared with",
                    token=token,
                )
        except Exception as error:
            command = later(str(repository), place)
            logger.error("The card of %s was not pushed (%s). To push it: %s", repository, error, command)
