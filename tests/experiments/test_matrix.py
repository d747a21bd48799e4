"""Cells of targets by guides: each the gain of a guided run at equal steps."""

import json

import pytest

from hf_guidance.experiments.matrix import cells_of, matrix_table, plot_gains
from hf_guidance.experiments.verdicts import difference

REPORTS = {
    "wide": {
        "differences": [
            difference("by_vit", "alone", {0: 1.0, 1: 2.0, 2: 3.0}, "points"),
            difference("by_vit", "alone_equal_time", {0: -9.0}, "points"),
            difference("by_fcn", "alone", {0: -1.5}, "points"),
        ]
    },
    "deep": {"differences": [difference("by_fcn", "alone", {0: 4.0}, "points")]},
}


@pytest.fixture
def cells():
    return cells_of(REPORTS, {"by_vit": "vit", "by_fcn": "fcn"})


def test_a_cell_is_the_gain_at_equal_steps_and_empty_where_nothing_ran(cells):
    assert {name: list(row) for name, row in cells.items()} == {"wide": ["vit", "fcn"], "deep": ["vit", "fcn"]}
    assert cells["wide"]["vit"]["mean"] == 2.0
    assert cells["deep"]["vit"] is None
    json.dumps(cells)


def test_the_table_has_intervals_from_three_seeds_on(cells):
    assert matrix_table(cells).splitlines() == [
        "| target, guided by | vit               | fcn  |",
        "|-------------------|-------------------|------|",
        "| wide              | +2.0 [-0.5, +4.5] | -1.5 |",
        "| deep              | –                 | +4.0 |",
    ]


def test_the_figure_has_a_word_in_every_cell(cells, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    words = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **kwargs: words.append(text))
    plot_gains(cells, tmp_path / "matrix.png")
    assert words == ["+2.0\n[-0.5, +4.5]", "-1.5", "–", "+4.0"]
    assert (tmp_path / "matrix.png").stat().st_size > 5000
