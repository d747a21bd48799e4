"""The blocks on the recipes' pages are what `make results` makes of the committed results."""

from pathlib import Path

import pytest

from hf_guidance.analysis.figures import DIGEST
from hf_guidance.experiments import pages
from hf_guidance.experiments.pages import (
    Claim,
    claims_table,
    controls_of,
    controls_table,
    plot_controls,
    read_results,
    written_anew,
)
from hf_guidance.experiments.verdicts import EQUAL_TIME, difference

RECIPES = Path(__file__).parents[2] / "recipes"
RESULTS = read_results(RECIPES / "results")


PAGES = [RECIPES / "README.md", RECIPES.parent / "README.md", RECIPES / "LOG.md"]


@pytest.mark.parametrize("path", PAGES, ids=["recipes", "first", "log"])
def test_a_page_is_as_the_results_make_it(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    page = path.read_text(encoding="utf-8")
    assert ("<!-- deep_fcn_controls -->" if path.stem == "LOG" else "<!-- claims -->") in page
    assert written_anew(page, RESULTS) == page


def report_of(gains, run="guided"):
    runs = [
        {
            "run": name,
            "seed": seed,
            "steps": 9,
            "seconds": 1.0,
            "validation": value,
            "test": {"accuracy": value},
            "guide": 0,
        }
        for seed, gain in gains.items()
        for name, value in (("alone", 0.5), (run, 0.5 + gain / 100))
    ]
    return {
        "command": "accelerate launch x.py",
        "task": {"metric": "accuracy", "percent": True},
        "environment": {
            "device": "cpu: C",
            "threads": 2,
            "python": "3",
            "torch": "2",
            "transformers": "5",
            "accelerate": "1",
        },
        "learning_rate_search": [
            {"run": "alone-lr0.1", "seed": 7, "validation": 0.25},
            {"run": "alone-lr0.1", "seed": 8, "validation": 0.75},
        ],
        "runs": runs,
        "differences": [difference(run, baseline, gains, "points") for baseline in ("alone", EQUAL_TIME)],
    }


def test_a_claim_is_shown_where_its_interval_is_above_0_and_holms_adjustment_leaves_it(monkeypatch):
    sure, likely, none = {0: 9.0, 1: 10.0, 2: 11.0}, {0: 1.0, 1: 2.0, 2: 3.2}, {0: -1.0, 1: 2.0, 2: 0.0}
    reports = {"a": report_of(sure), "b": report_of(likely), "c": report_of(none)}
    monkeypatch.setattr(pages, "CLAIMS", tuple(Claim(f"claim {n}", n, "guided", "paper") for n in "abcd"))
    lines = claims_table(reports).splitlines()[2:]
    assert len(lines) == 3  # the fourth has no results
    assert "| **+10.0 points [+7.5, +12.5], shown** |" in lines[0]
    assert "+2.1 points [-0.7, +4.8], not shown" in lines[1]  # ± 4.303 · 1.102 / √3
    assert "+0.3 points [-3.5, +4.1], not shown" in lines[2]
    assert "50.0 % → 60.0 %" in lines[0]


def test_what_only_holms_adjustment_takes_away_is_said(monkeypatch):
    nearly = {0: 1.0, 1: 2.0, 2: 1.7}  # p is 0.034 alone, and 0.068 of two
    monkeypatch.setattr(pages, "CLAIMS", tuple(Claim(f"claim {n}", n, "guided", "paper") for n in "ab"))
    assert "shown (not after Holm)" in claims_table({"a": report_of(nearly), "b": report_of(nearly)})
    assert "**" in claims_table({"a": report_of(nearly)})
    assert "+1.5 points, not shown (too few seeds)" in claims_table({"a": report_of({0: 1.0, 1: 2.0})})
    same = report_of({0: 5.0, 1: 5.0, 2: 5.0})  # p is 0
    assert "**+5.0 points [+5.0, +5.0], shown**" in claims_table({"a": same})


def test_whatever_was_tried_beside_a_claim_is_one_table_and_one_figure(tmp_path):
    gains, more = {0: 9.0, 1: 10.0, 2: 11.0}, {0: -3.0, 1: -2.0, 2: -1.0}
    reports = {
        "copy_paste_controls": report_of(gains, "noise_guide"),
        "copy_paste_measures": report_of(more, "untrained_guide-measure_linear_cka"),
        "deep_fcn_controls": report_of({0: 4.0}, "noise_guide"),
        "deep_fcn": report_of(gains, "trained_guide"),
    }
    found = controls_of(reports)
    assert [list(runs) for runs in found.values()] == [["noise guide", "by linear_cka"], ["noise guide"]]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in controls_table(reports).splitlines()]
    assert lines[2:] == [
        ["noise guide", "+10.0 [+7.5, +12.5]", "+4.0"],
        ["by linear_cka", "-2.0 [-4.5, +0.5]", "–"],
    ]
    plot_controls(reports, tmp_path / "c.png")
    assert drawn(tmp_path / "c.png")


def test_the_figure_of_the_controls_is_that_of_the_results(tmp_path):
    plot_controls(RESULTS, tmp_path / "c.png")
    assert drawn(tmp_path / "c.png") == drawn(RECIPES / "results" / "controls.png")


def drawn(path):
    """The digest of what a figure shows."""
    from PIL import Image

    return Image.open(path).text[DIGEST]


def test_a_block_without_results_is_an_error():
    with pytest.raises(ValueError, match="block 'gone', but the results are a: add gone"):
        written_anew("<!-- gone -->\n<!-- end -->", {"a": report_of({0: 1.0})})
    assert written_anew("x <!-- a -->\nold<!-- end --> y", {"a": report_of({0: 1.0})}).startswith("x <!-- a -->\n```sh")
