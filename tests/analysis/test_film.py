"""Films and panels of similarity maps."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_guidance.analysis import plot_film
from hf_guidance.analysis.history import SimilarityMap


def frame(value: float) -> SimilarityMap:
    return {
        "measure": "linear_cka",
        "target_layers": ["a", "b"],
        "guide_layers": ["x", "y"],
        "similarity": [[value, 0.5], [0.0, value]],
        "pairs": ["a~x", "b~y"],
    }


def test_a_film_shows_every_frame_and_stands_still_at_the_end(tmp_path: Path) -> None:
    plot_film({0: frame(0.1), 20: frame(0.4), 10: frame(0.2)}, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        durations = []
        for number in range(getattr(film, "n_frames", 1)):
            film.seek(number)
            durations.append(film.info["duration"])
    assert sum(durations) == (3 + 5) * 250
    assert durations[0] == 250


def test_panels_are_spread_evenly_and_say_the_mean_of_the_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: titles.extend(p.get_title() for p in figure.axes))
    plot_film({step: frame(step / 100) for step in range(0, 70, 10)}, tmp_path / "film.png", "guided")
    assert [title for title in titles if title] == [
        f"guided\nstep {step}, mean of the pairs {step / 100:.2f}" for step in (0, 20, 40, 60)
    ]


def test_no_frame_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no similarity map to draw"):
        plot_film({}, tmp_path / "film.gif")
