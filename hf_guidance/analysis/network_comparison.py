"""Similarity of the layers of any two networks over a whole dataset."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from hf_guidance.analysis.figures import save
from hf_guidance.analysis.heat_maps import draw_map
from hf_guidance.analysis.hsic_sums import FEWEST, HSICSums
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.reader import LayerReader
from hf_guidance.features.rows import Batch, content_of
from hf_guidance.features.samples import Samples
from hf_guidance.guide.calling import forward
from hf_guidance.guide.freezing import check_is_network
from hf_guidance.guide.inputs import check_own_columns, guide_batch, seen_by_target, without_guide
from hf_guidance.guide.random_state import fingerprint
from hf_guidance.similarity.layers import Layer
from hf_guidance.similarity.pair_loss import guidance_loss_of_groups
from hf_guidance.similarity.registry import Measure, get_measure, primal_below_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Rows: TypeAlias = Iterable[Batch]
Collator: TypeAlias = Callable[[list[Any]], Mapping[str, Any]]
STREAMED = ("linear_cka", "debiased_cka")
MOST = 1024  # rows at once for a measure that needs all samples together
MAX_TOKENS = 1024  # of a batch
# of messages about guidance, and what they mean here
WORDS = (
    (r"\btarget_layers\b", "layers_a"),
    (r"\bguide_layers\b", "layers_b"),
    (r"\btarget layer\b", "layer of a"),
    (r"\bguide layer\b", "layer of b"),
    (r"\bthe target\b", "network a"),
    (r"\bthe guide\b", "network b"),
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Similarities of the layers of two networks.

    Attributes:
        values: Similarity of each layer of a with each of b, `(layers of a, layers of b)`; NaN where one is constant.
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
        from matplotlib.figure import Figure

        high, wide = (min(9.0, 2.0 + 0.28 * len(layers)) for layers in (self.layers_a, self.layers_b))
        figure = Figure(figsize=(wide + 1.2, high), layout="constrained")
        panel = figure.subplots()
        titles = f"layers of {names[0]}", f"layers of {names[1]}"
        image = draw_map(panel, self.values.tolist(), self.layers_a, self.layers_b, titles)
        panel.set_title(f"{self.samples} {SAMPLE_WORDS[self.sample_axis]}", fontsize=8)
        figure.colorbar(image, label=self.measure.replace("_", " ").replace("cka", "CKA"), shrink=0.9)
        if path is not None:
            save(figure, path)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file, from which `load` reads it."""
        content = asdict(self) | {"values": _plain(self.values)}
        content["errors"] = None if self.errors is None else _plain(self.errors)
        Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("values", "errors"):
            content[name] = None if content[name] is None else np.array(content[name], dtype=np.float64)
        return cls(**content)


SAMPLE_WORDS = {"sequence": "rows", "token": "tokens", "within": "positions"}


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


@torch.no_grad()
def compare(
    a: nn.Module,
    b: nn.Module,
    data: Rows,
    *,
    measure: str = "debiased_cka",
    layers_a: Sequence[str] | None = None,
    layers_b: Sequence[str] | None = None,
    sample_axis: str = "sequence",
    samples: int | None = None,
    batch_size: int = 32,
    collator: Collator | None = None,
    feature_layout: str = "auto",
    device: torch.device | str | None = None,
) -> Comparison:
    """Compute the similarity of every layer of one network with every layer of another over a dataset.

    Linear and debiased CKA stream: memory does not grow with the data, and the values do not depend on how these are
    batched, except for noise, whose size is estimated. (Tokens of one row are more alike than others, so that on the
    token axis a batch should have many rows.) Any other measure compares up to 1024 rows in one batch, of a DataLoader
    its first one. Both networks run in evaluation mode and are left as they were. Padding does not count. A batch with
    fewer samples than the measure needs, as the last one may be, is left out.

    Args:
        a: A network. It sees all columns that it accepts but those that begin with `guide_`.
        b: Another one, or the same. It sees the columns that begin with `guide_`, if there are any, else what a sees.
        data: Rows: a Dataset or a list of dicts, read in a fixed random order; an iterable dataset, read from its
            beginning; or a DataLoader, whose batches are taken as they are.
        measure: Name of a measure.
        layers_a: Layers of a: `hidden_states`, or modules by name, glob or type; None for the hidden states.
        layers_b: Those of b.
        sample_axis: What a sample is: `sequence`, `token` or `within`, as in `GuidanceConfig`. Of tokens up to 1024 of
            each batch are compared.
        samples: Most rows to compare; None for all, or 1024 for a measure that does not stream.
        batch_size: Rows in a batch.
        collator: Makes a batch from a list of rows; by default `transformers.default_data_collator`.
        feature_layout: As in `GuidanceConfig`, for the maps of images.
        device: Where to run both networks; None for where each is.

    Returns:
        The values, with the names of the layers and the number of samples.

    Raises:
        ValueError: If a network does not run on these data or has none of the layers, its features are random or not
            finite, the networks have other positions or rows, there are too few samples, or a stream has no `samples`.

    Example:
        >>> found = compare(bert, roberta, rows, samples=500)  # doctest: +SKIP
        >>> found.to_pandas().round(2)  # doctest: +SKIP
    """
    for network, name in ((a, "a"), (b, "b")):
        check_is_network(network, name)
    if sample_axis not in SAMPLE_WORDS:
        raise ValueError(f"sample_axis is {sample_axis!r}; possible are {', '.join(SAMPLE_WORDS)}.")
    if batch_size < 1 or (samples is not None and samples < 1):
        raise ValueError(f"batch_size is {batch_size} and samples {samples}; both must be at least 1.")
    chosen = get_measure(measure)
    streams = measure in STREAMED
    if measure == "linear_cka" and sample_axis == "within":
        raise ValueError("linear_cka within rows depends on how many positions they have: use debiased_cka.")
    if not streams:
        samples = min(samples or MOST, MOST)
        batch_size = samples
    limits = [0.0, 0.0] if streams else [primal_below_of([chosen], of_guide) for of_guide in (False, True)]
    with ExitStack() as stack:
        stack.enter_context(_in_words())
        stack.enter_context(_as_they_were(a, b, device))
        readers = []
        for network, named, role in ((a, layers_a, "target"), (b, layers_b, "guide")):
            layers = [named] if isinstance(named, str) else list(named or ["hidden_states"])
            readers.append(LayerReader(network, layers, role))
            stack.callback(readers[-1].remove)
        least = FEWEST if streams else chosen.min_samples
        both = _Both(a, b, readers, sample_axis, limits, least, feature_layout)
        sums, found, count, rows_seen = HSICSums(), None, 0, 0
        for batch in _batches(data, samples, batch_size, collator or default_data_collator):
            of_both = both.layers(batch, rows_seen)
            rows_seen += len(content_of(batch))
            if of_both is None:
                continue
            if not streams:
                found = _at_once(of_both, chosen)
                count = sum(layer.samples * layer.rows for layer in next(iter(of_both[0].values())))
                break
            for group in range(len(next(iter(of_both[0].values())))):
                of_a, of_b = ([side[name][group] for name in side] for side in of_both)
                if of_a[0].samples >= FEWEST:
                    sums.add(of_a, of_b)
        names = [reader.names() if rows_seen else [] for reader in readers]
    if not streams and found is not None:
        return Comparison(found, names[0], names[1], measure, sample_axis, count, 1)
    if not sums.batches:
        raise ValueError(
            f"no batch of the data has the {both.least} samples that {measure} needs ({rows_seen} rows were read, "
            f"with samples={samples} and batch_size={batch_size}): raise what is too small."
        )
    values, errors = sums.debiased() if measure == "debiased_cka" else sums.linear()
    deviations = None if errors is None else errors.numpy()
    return Comparison(values.numpy(), names[0], names[1], measure, sample_axis, sums.samples, sums.batches, deviations)


class _Both:
    """Both networks, and their layers on a batch."""

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        readers: Sequence[LayerReader],
        axis: str,
        limits: Sequence[float],
        least: int,
        layout: str,
    ) -> None:
        self.a, self.b, self.readers, self.axis, self.limits, self.least = a, b, readers, axis, limits, least
        self.conventions = [Conventions(r.model, r.modules, layout, r) for r in readers]
        self._draws_nothing = False

    def layers(self, batch: Batch, seed: int) -> list[dict[str, tuple[Layer, ...]]] | None:
        """Run both networks on a batch, and return the layers of each; None if it has too few samples."""
        check_own_columns(batch)
        inputs = [seen_by_target(without_guide(batch), self.a), guide_batch(batch, self.a, self.b)]
        found: list[dict[str, tuple[Layer, ...]]] = []
        like: Samples | None = None
        for number, (network, reader) in enumerate(zip((self.a, self.b), self.readers, strict=True)):
            samples = Samples(
                inputs[number],
                self.axis,
                MAX_TOKENS,
                seed,
                least=self.least,
                like=like,
                primal_below=self.limits[number],
                conventions=self.conventions[number],
            )
            if like is None and (samples.count < (self.least if self.axis == "sequence" else 1)):
                return None
            before = None if self._draws_nothing else fingerprint()
            with reader.reading(samples.layers) as read:
                forward(network, inputs[number], ("target", "guide")[number])
            if before is not None and before != fingerprint():
                raise ValueError(
                    f"network {'ab'[number]} ({type(network).__name__}) draws random numbers in evaluation mode, so "
                    "that its features are never twice the same: switch this off in its config, or take its plain "
                    "encoder."
                )
            found.append({name: read[name] for name in reader.names() if name in read})
            for name, groups in found[number].items():
                if not all(bool(layer.values.isfinite().all()) for layer in groups):
                    raise ValueError(
                        f"layer {name!r} of network {'ab'[number]} has features that are not finite: look for them in "
                        "its weights or in the data."
                    )
            if number and like is not None:
                like.check_aligned(list(product(found[0], found[1])), found[0], samples, found[1])
            like = like or samples
        self._draws_nothing = True
        fewest = max(layer.samples for layer in next(iter(found[0].values())))
        return found if fewest >= self.least else None


def _at_once(layers: Sequence[dict[str, tuple[Layer, ...]]], measure: Measure) -> np.ndarray:
    """Compare all layers on one batch by any measure."""
    pairs = list(product(layers[0], layers[1]))
    values = guidance_loss_of_groups(pairs, measure, layers[0], layers[1])[1]
    return np.array(list(map(float, values.values()))).reshape(len(layers[0]), len(layers[1]))


@contextmanager
def _in_words() -> Iterator[None]:
    """Let errors speak of networks a and b instead of target and guide."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        for pattern, words in WORDS:
            said = re.sub(pattern, words, said)
        if said == str(error):
            raise
        starts = said.startswith(("network ", "layer "))
        raise ValueError(said[0].upper() + said[1:] if starts else said) from error


@contextmanager
def _as_they_were(a: nn.Module, b: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Put both networks into evaluation mode, on the device, and back."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device is {device}, which is not there: {str(error).splitlines()[0]}") from error
    modes = [(module, module.training) for network in (a, b) for module in network.modules()]
    places = [next((p.device for p in network.parameters()), None) for network in (a, b)]
    try:
        for network in (a, b):
            network.eval()
            if device is not None:
                network.to(device)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for network, place in zip((a, b), places, strict=True):
            if device is not None and place is not None:
                network.to(place)


def _batches(data: Any, samples: int | None, size: int, collator: Collator) -> Iterator[Batch]:
    """Yield the batches of the data with a progress bar, which is not drawn where nobody sees it."""
    if isinstance(data, DataLoader):
        left = samples
        for batch in tqdm(data, disable=None, unit="batch"):
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"the DataLoader gives a {type(batch).__name__}; expected batches as dicts of columns."
                )
            size = len(content_of(batch))
            if left is not None and size > left:
                batch = {k: v[:left] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            yield batch
            left = None if left is None else left - size
            if left is not None and left <= 0:
                return
        return
    if isinstance(data, Mapping):
        raise ValueError(
            f"the data are a {type(data).__name__} with {', '.join(map(str, data))}; expected rows: choose a split of "
            "a DatasetDict, or make a list of dicts of columns."
        )
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()[:samples]
        rows: Iterator[Any] = (data[i] for i in order)
        total = len(order)
    elif samples is None:
        raise ValueError(
            f"the data ({type(data).__name__}) have no length, and may have no end: give the number of samples to read."
        )
    else:
        rows, total = iter(data), samples
    with tqdm(total=total, disable=None, unit="row") as bar:
        left = total
        while left:
            found = list(islice(rows, min(size, left)))
            if not found:
                return
            yield _collated(found, collator)
            bar.update(len(found))
            left -= len(found)


def _collated(rows: list[Any], collator: Collator) -> Batch:
    try:
        return dict(collator(rows))
    except Exception as error:
        kind = sorted(rows[0]) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
        raise ValueError(
            f"rows with {kind} do not make a batch: {type(error).__name__}: {str(error).splitlines()[0]} Pass a "
            "collator, such as DataCollatorWithPadding(tokenizer) for texts of several lengths."
        ) from error
