"""Publishing of what a recipe found: numbers, tables, figures and cards in its folder."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from hf_guidance.analysis.curves import plot_comparison
from hf_guidance.analysis.heat_maps import plot_similarity_maps
from hf_guidance.experiments.cards import push_runs, write_cards
from hf_guidance.experiments.consistency import plot_errors
from hf_guidance.experiments.files import write_json
from hf_guidance.experiments.matrix import Cells, matrix_table, plot_gains
from hf_guidance.experiments.report import Report, comparison_rows, markdown_table
from hf_guidance.experiments.results_page import page_of
from hf_guidance.experiments.verdicts import in_words
from hf_guidance.experiments.watching import plot_dimensions, plot_films


def publish(report: Report, folder: Path, args: TrainingArguments) -> None:
    """Write results.json, results.md, figures and cards, the numbers first: a later failure must not lose them."""
    metric, percent = report["task"]["metric"], report["task"]["percent"]
    report["table"] = comparison_rows(report["runs"], metric=metric)
    write_json(folder / "results.json", report)
    (folder / "results.md").write_text(page_of(report), encoding="utf-8")
    print("\n" + markdown_table(report["table"], metric, percent) + "\n")
    for found in report["differences"]:
        print(in_words(found))
    plot_comparison(
        report["runs"],
        metric,
        folder / "comparison.png",
        percent=percent,
        log=not percent,
        chance=report["task"].get("chance"),
    )
    written = [f"{folder}/results.json", f"{folder}/results.md", f"{folder}/comparison.png"]
    if plot_similarity_maps(report["runs"], folder / "similarity.png"):
        written.append(f"{folder}/similarity.png")
    if plot_dimensions(report["runs"], folder / "dimensions.png"):
        written.append(f"{folder}/dimensions.png")
    if plot_errors(report["runs"], folder, folder / "errors.png"):
        written.append(f"{folder}/errors.png")
    written += plot_films(report["runs"], folder)
    cards = write_cards(report, folder)
    print(", ".join([*written, *(f"{place}/README.md" for place in cards)]))
    if args.push_to_hub:
        push_runs(report, cards, args.hub_token, args.hub_revision)


def publish_matrix(cells: Cells, folder: Path) -> None:
    """Write the gains of several targets as matrix.json, print them as a table, and draw them."""
    write_json(folder / "matrix.json", cells)
    print("\n" + matrix_table(cells) + "\n")
    plot_gains(cells, folder / "matrix.png")
    print(f"{folder}/matrix.json, {folder}/matrix.png")
