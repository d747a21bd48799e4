"""The figures in the READMEs are those of the committed results, which a command made."""

import json
import re
from pathlib import Path

import pytest

from hf_guidance.experiments.report import comparison_rows, markdown_table

RECIPES = Path(__file__).parents[2] / "recipes"
RESULTS = sorted(RECIPES.glob("results/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_and_its_command_stand_in_the_readme_as_the_results_have_them(path):
    report = json.loads(path.read_text())
    metric = report["task"]["metric"]
    readme = (RECIPES / "README.md").read_text()
    table = markdown_table(comparison_rows(report["runs"], metric=metric), metric, percent=report["task"]["percent"])
    assert table in readme
    assert report["command"] in readme
    for fact in (
        report["environment"]["torch"],
        report["environment"]["transformers"],
        report["environment"]["device"],
    ):
        assert fact in readme


def test_every_mean_on_the_first_page_is_one_of_the_results():
    tables = (RECIPES / "README.md").read_text()
    means = re.findall(r"\d+\.\d+ ± \d+\.\d+", (RECIPES.parent / "README.md").read_text())
    assert len(means) > 3
    assert [mean for mean in means if mean not in tables] == []


ROW = re.compile(r"\| ([\d.]+) ± .*\| \**([\d.]+) ± [\d. %]+\** +\| ([+−])([\d.]+) \|")


def test_every_difference_on_the_first_page_is_that_of_its_row():
    rows = [line for line in (RECIPES.parent / "README.md").read_text().splitlines() if re.search(r"\| [+−]\d", line)]
    assert len(rows) > 8
    for row in rows:
        found = ROW.search(row.replace("**", ""))
        alone, guided, sign, size = found.groups()
        difference = float(guided) - float(alone)
        assert (difference < 0) == (sign == "−"), row
        assert abs(abs(difference) - float(size)) < 0.051, row


def test_there_are_results():
    assert RESULTS
