"""Which runs err on the same test images, of the first seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_guidance.analysis.errors import error_consistency_matrix, plot_error_consistency
from hf_guidance.analysis.history import run_in_words
from hf_guidance.experiments.comparison import PREDICTIONS
from hf_guidance.experiments.report import Record


def plot_errors(runs: Sequence[Record], folder: Path, path: str | os.PathLike[str]) -> bool:
    """Draw the error consistency of every run with every other, for the first seed, and save the figure.

    Args:
        runs: Records of the runs.
        folder: Output folder of the recipe, which holds `seed-<seed>/<run>/predictions.npz` for classes.
        path: Where to save the figure; the suffix decides the format.

    Returns:
        Whether at least two runs have predictions to draw.
    """
    first = next((run["seed"] for run in runs), None)
    places = {run["run"]: folder / f"seed-{first}" / run["run"] / PREDICTIONS for run in runs if run["seed"] == first}
    files = {run_in_words(name): np.load(place) for name, place in places.items() if place.is_file()}
    if len(files) < 2:
        return False
    predictions = {name: file["predictions"] for name, file in files.items()}
    plot_error_consistency(error_consistency_matrix(predictions, next(iter(files.values()))["labels"]), path)
    return True
