"""A picture tells what is drawn on it."""

import PIL.Image
import pytest

from hf_guidance.analysis.figures import DIGEST, save


def drawn(folder, **change):
    from matplotlib.figure import Figure

    content = {"line": [1.0, 2.0], "band": 0.5, "image": [[0.1, 0.2]], "title": "curves", "point": 3.0} | change
    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], content["line"])
    left.fill_between([0, 1], [0, 0], [content["band"], 1])
    left.set_title(content["title"])
    right.imshow(content["image"])
    right.scatter([0], [content["point"]])
    save(figure, folder / "figure.png")
    return PIL.Image.open(folder / "figure.png").text[DIGEST]


def test_the_same_has_the_same_digest(tmp_path):
    assert drawn(tmp_path) == drawn(tmp_path, line=[1.0, 2.000000001])


@pytest.mark.parametrize(
    "change", [{"line": [1, 2.01]}, {"band": 0.6}, {"image": [[0.1, 0.21]]}, {"title": "lines"}, {"point": 4.0}]
)
def test_whatever_else_is_drawn_has_another(change, tmp_path):
    assert drawn(tmp_path) != drawn(tmp_path, **change)


def test_other_formats_are_saved_without_it(tmp_path):
    from matplotlib.figure import Figure

    save(Figure(), tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
