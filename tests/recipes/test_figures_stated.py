"""The figures on the pages are those of the committed results, which a command made; docstrings hold none."""

import ast
import json
import re
from pathlib import Path

import pytest

from hf_guidance.experiments.report import comparison_rows, markdown_table
from hf_guidance.experiments.verdicts import in_words

RECIPES = Path(__file__).parents[2] / "recipes"
RESULTS = sorted(RECIPES.glob("results/*.json"))
PAGES = "\n".join(path.read_text() for path in sorted(RECIPES.rglob("*.md")))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_and_its_command_stand_in_the_readme_as_the_results_have_them(path):
    report = json.loads(path.read_text())
    metric = report["task"]["metric"]
    readme = PAGES
    table = markdown_table(comparison_rows(report["runs"], metric=metric), metric, percent=report["task"]["percent"])
    assert table in readme
    assert report["command"] in readme
    for found in report.get("differences", []):
        assert in_words(found) in readme
    for fact in (
        report["environment"]["torch"],
        report["environment"]["transformers"],
        report["environment"]["device"],
    ):
        assert fact in readme


def test_every_gain_on_the_first_page_is_one_of_the_results():
    gains = re.findall(r"[+-]\d+\.\d (?:points|%) \[[^]]+\]", (RECIPES.parent / "README.md").read_text())
    assert len(gains) > 10
    assert [gain for gain in gains if gain not in PAGES] == []


FIGURE = re.compile(
    r"\d\.\d|\d ?%|\b(accuracy|perplexity)\b[^.\n]*\d|\d[^.\n]*\b(accuracy|perplexity)\b", re.IGNORECASE
)


def figures_in(source: str) -> list[str]:
    """Return the lines of a file's docstrings that hold a figure, commands aside."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    lines = [line.strip() for node in nodes for line in (ast.get_docstring(node) or "").splitlines()]
    return [line for line in lines if FIGURE.search(line) and not line.startswith("accelerate launch ")]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.py")), ids=lambda path: path.stem)
def test_a_docstring_of_a_recipe_holds_no_accuracy_or_perplexity(path):
    assert figures_in(path.read_text()) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("copy-paste 43.0 against 21.6 % (untrained guide)", True),
        ("an accuracy of 43", True),
        ("97% of the images", True),
        ("Shakespeare at perplexity 137", True),
        ("accelerate launch recipes/x.py --learning_rate 0.1", False),
        ("accelerate launch recipes/x.py --guide timm/resnet18.a1_in1k --seeds 0 1 2", False),
        ("Results, full commands and hardware: recipes/README.md.", False),
        ("floor: 64/64/512 and depth 18, 34 or 50", False),
    ],
)
def test_a_figure_in_a_docstring_would_be_found(line, found):
    assert figures_in(f'"""Summary.\n\n{line}\n"""') == ([line] if found else [])
    assert figures_in(f'def measure():\n    """Measure.\n\n    {line}\n    """') == ([line] if found else [])


def test_there_are_results():
    assert RESULTS
