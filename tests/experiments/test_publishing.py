"""The numbers of a recipe are written before anything that could fail."""

import json

import pytest
from test_pages import report_of

from hf_guidance.experiments import publishing
from hf_guidance.experiments.publishing import publish, publish_matrix
from hf_guidance.experiments.results_page import page_of
from hf_guidance.experiments.verdicts import difference


def test_numbers_and_their_page_are_there_though_a_figure_fails(tmp_path, monkeypatch, capsys):
    report = report_of({0: 1.0}) | {"recipe": "which_prior"}
    report["task"]["name"] = "images"
    monkeypatch.setattr(publishing, "plot_comparison", lambda *args, **kwargs: None)
    monkeypatch.setattr(publishing, "write_cards", broken)
    with pytest.raises(OSError, match="no space"):
        publish(report, tmp_path, None)
    assert json.loads((tmp_path / "results.json").read_text())["table"][0]["run"] == "alone"
    assert (tmp_path / "results.md").read_text() == page_of(report)
    printed = capsys.readouterr().out
    assert "| guided | 0 " in printed
    assert "guided − alone, equal steps, test: +1.0 points (seeds 0: +1.0)" in printed


def broken(*_):
    raise OSError("no space")


def test_a_matrix_is_written_and_printed(tmp_path, capsys):
    cells = {"deep": {"resnet": difference("guided", "alone", {0: 1.0}, "points")}}
    publish_matrix(cells, tmp_path)
    assert json.loads((tmp_path / "matrix.json").read_text())["deep"]["resnet"]["mean"] == 1.0
    assert (tmp_path / "matrix.png").is_file()
    assert "| deep              | +1.0   |" in capsys.readouterr().out
