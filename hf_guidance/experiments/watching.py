"""The intrinsic dimension and the similarity of layers over training, as a recipe measures and draws them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_guidance.analysis.dimensions import intrinsic_dimension
from hf_guidance.analysis.figures import save
from hf_guidance.analysis.film import plot_film
from hf_guidance.analysis.history import DIMENSION
from hf_guidance.analysis.runs import colours_of, label_of
from hf_guidance.experiments.report import Record
from hf_guidance.features.batch import Batch
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.inputs import GUIDE_PREFIX


class WatchedDimensions(TrainerCallback):
    """A callback that measures the intrinsic dimension (two-NN) of each hidden state at every evaluation.

    Each row is one sample, all its positions flattened. The values stand in the trainer's log history.

    Args:
        batch: Rows to measure, at least 3. Columns for a guide are left out.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = {name: value for name, value in batch.items() if not name.startswith(GUIDE_PREFIX)}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = [log for log in state.log_history if log["step"] == state.global_step]
        if any(name.startswith(DIMENSION) for log in now for name in log):
            return  # the test after the last evaluation
        found = {DIMENSION + name: value for name, value in self.measured(kwargs["model"]).items()}
        state.log_history.append({"step": state.global_step, **found})

    @torch.no_grad()
    def measured(self, model: PreTrainedModel) -> dict[str, float]:
        """Return layer → dimension; a layer in which most rows are alike is left out."""
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in self.batch.items()}
        training = model.training
        reader = LayerReader(model.eval(), ["hidden_states"], "target")
        found: dict[str, float] = {}
        try:
            with reader.reading(lambda _, features: features.float()) as read:
                model(**inputs)
                for name, features in read.items():
                    with suppress(ValueError):
                        found[name] = intrinsic_dimension(features)
        finally:
            reader.remove()
            model.train(training)
        return found


def plot_dimensions(runs: Sequence[Record], path: str | os.PathLike[str]) -> bool:
    """Draw the mean intrinsic dimension of each run's layers over training, and save the figure.

    Args:
        runs: Records of the runs.
        path: Where to save the figure; the suffix decides the format.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["run"] for run in runs))
    if not any(run.get("dimensions") for run in runs):
        return False
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    panel = figure.subplots()
    colours = colours_of(names)
    for name in names:
        first = next(run for run in runs if run["run"] == name)
        by_step: dict[int, list[float]] = {}
        for run in runs:
            for point in run.get("dimensions", []) if run["run"] == name else []:
                by_step.setdefault(int(point["step"]), []).extend(v for k, v in point.items() if k != "step")
        if by_step:
            values = [statistics.fmean(by_step[step]) for step in sorted(by_step)]
            panel.plot(sorted(by_step), values, color=colours[name], marker=".", label=label_of(first))
    panel.set(xlabel="optimizer step", ylabel="intrinsic dimension, mean of layers")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)
    return True


def plot_films(runs: Sequence[Record], folder: Path) -> list[str]:
    """Draw the film of each guided run that has one, for its first seed, as `film-RUN.gif`; return the files."""
    written = []
    for name, run in {run["run"]: run for run in reversed(runs) if run.get("film")}.items():
        written.append(f"{folder}/film-{name}.gif")
        plot_film({int(step): found for step, found in run["film"].items()}, written[-1], label_of(run))
    return written[::-1]
