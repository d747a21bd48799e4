"""Figures saved to disk, each with a digest of its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGEST = "Drawn"  # name of the field in a PNG file
DIGITS = 4


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Save a figure. A PNG file stores the digest of its content in the field `Drawn`.

    Two PNG files with the same digest show the same figure.
    """
    metadata = {DIGEST: digest(figure)} if Path(path).suffix == ".png" else None
    figure.savefig(path, dpi=150, metadata=metadata, bbox_inches="tight", pad_inches=0.08)


def digest(figure: Figure) -> str:
    """Compute the SHA-256 of a figure's words and of its numbers, rounded to four digits.

    The digest does not depend on the version of matplotlib.
    """
    found = hashlib.sha256()
    for words, numbers in _drawn(figure):
        found.update(words.encode())
        for number in np.asarray(numbers, dtype=np.float64).ravel():
            found.update(f"{number:.{DIGITS}g},".encode())
    return found.hexdigest()


def _drawn(figure: Figure) -> Iterator[tuple[str, object]]:
    for panel in figure.axes:
        legend = panel.get_legend()
        words = [panel.get_title(), panel.get_xlabel(), panel.get_ylabel(), panel.get_yscale()]
        words += [text.get_text() for text in (legend.get_texts() if legend else [])]
        if panel.images:  # the ticks of an image are named explicitly
            words += [label.get_text() for label in (*panel.get_xticklabels(), *panel.get_yticklabels())]
        yield "|".join(words), ()
        for line in panel.lines:
            yield f"{line.get_label()} {line.get_color()} {line.get_linestyle()}", line.get_xydata()
        for image in panel.images:
            yield (
                f"{image.get_cmap().name} {image.origin}",
                (*image.get_clim(), *np.ravel(np.asarray(image.get_array()))),
            )
        for marks in panel.collections:
            yield "marks", marks.get_offsets()
            for outline in marks.get_paths() if "Poly" in type(marks).__name__ else ():
                yield "band", outline.vertices
