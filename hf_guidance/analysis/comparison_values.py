"""The similarities of the layers of two networks: as a table, a figure and a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.heat_maps import draw_map
from hf_guidance.analysis.history import measure_in_words

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SAMPLE_WORDS = {"sequence": "rows", "token": "tokens", "within": "positions"}  # sample axis → what its samples are


@dataclass(frozen=True, eq=False)
class Comparison:
    """Similarities of the layers of two networks.

    Attributes:
        values: Similarity of each layer of a with each of b, `(layers of a, layers of b)`; CKA is NaN where
            one is constant, other measures 0.
        layers_a: Names of the layers of a.
        layers_b: Names of the layers of b.
        measure: Name of the measure.
        sample_axis: What a sample is, as in `GuidanceConfig`.
        samples: Number of samples compared.
        batches: Number of batches that they came in.
        errors: Standard error of each value, by a bootstrap over batches. None for fewer than eight batches, or for a
            measure that needs all samples at once.
    """

    values: np.ndarray
    layers_a: list[str]
    layers_b: list[str]
    measure: str
    sample_axis: str
    samples: int
    batches: int
    errors: np.ndarray | None = None

    def to_pandas(self) -> pandas.DataFrame:
        """Return the values as a data frame: a row for each layer of a, a column for each of b."""
        with _needs_recipes("to_pandas"):
            import pandas

        return pandas.DataFrame(self.values, index=self.layers_a, columns=self.layers_b)

    def plot(self, path: str | os.PathLike[str] | None = None, names: tuple[str, str] = ("a", "b")) -> Figure:
        """Draw the values as a map, with numbers in its cells if there are few.

        Args:
            path: Where to save the figure, if it is to be; the suffix decides the format.
            names: Names of the two networks.

        Returns:
            The figure.
        """
        with _needs_recipes("plot"):
            from matplotlib.figure import Figure

        high, wide = (min(9.0, 2.0 + 0.28 * len(layers)) for layers in (self.layers_a, self.layers_b))
        figure = Figure(figsize=(wide + 1.2, high), layout="constrained")
        panel = figure.subplots()
        titles = f"layers of {names[0]}", f"layers of {names[1]}"
        image = draw_map(panel, self.values.tolist(), self.layers_a, self.layers_b, titles)
        panel.set_title(f"{self.samples} {SAMPLE_WORDS[self.sample_axis]}", fontsize=8)
        figure.colorbar(image, label=measure_in_words(self.measure), shrink=0.9)
        if path is not None:
            save(figure, path)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file, from which `load` reads it."""
        content = asdict(self) | {"values": _plain(self.values)}
        content["errors"] = None if self.errors is None else _plain(self.errors)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("values", "errors"):
            content[name] = None if content[name] is None else np.array(content[name], dtype=np.float64)
        return cls(**content)


@contextmanager
def _needs_recipes(name: str) -> Iterator[None]:
    """Name the extra that brings what a function imports."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}: pip install 'hf_guidance[recipes]'.") from error


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]
