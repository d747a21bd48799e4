"""Similarity of the layers of any two networks over a whole dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice, product
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from hf_guidance.analysis.both_networks import BothNetworks, OfBoth, as_they_were, in_words
from hf_guidance.analysis.comparison_values import SAMPLE_WORDS, Comparison
from hf_guidance.analysis.hsic_sums import FEWEST, HSICSums
from hf_guidance.features.batch import Batch
from hf_guidance.features.inside import check_is_network
from hf_guidance.features.reader import LayerReader
from hf_guidance.features.rows import content_of
from hf_guidance.similarity.pair_loss import guidance_loss_of_groups
from hf_guidance.similarity.registry import Measure, get_measure, primal_below_of

Examples: TypeAlias = Iterable[Batch]
Collator: TypeAlias = Callable[[list[Any]], Mapping[str, Any]]
STREAMED = ("linear_cka", "debiased_cka")
ROWS_AT_ONCE = 1024  # for a measure that needs all samples together


@torch.no_grad()
def compare(
    a: nn.Module,
    b: nn.Module,
    data: Examples,
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
    batched, except for noise, whose size is estimated. On the token axis they compare tokens of different rows with one
    another: those of one row are alike, and would count for more in small batches. Any other measure compares up to
    1024 rows in one batch, of a DataLoader its first one. Both networks run in evaluation mode and are left as they
    were. Padding does not count. A batch with fewer samples than the measure needs, as the last one may be, is left
    out.

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
    chosen = _checked(measure, sample_axis, samples, batch_size)
    if not (streams := measure in STREAMED):
        batch_size = samples = min(samples or ROWS_AT_ONCE, ROWS_AT_ONCE)
    limits = [0.0, 0.0] if streams else [primal_below_of([chosen], of_guide) for of_guide in (False, True)]
    least = FEWEST if streams else chosen.min_samples
    with ExitStack() as stack:
        stack.enter_context(in_words())
        stack.enter_context(as_they_were(a, b, device))
        readers = []
        for network, named, role in ((a, layers_a, "target"), (b, layers_b, "guide")):
            layers = [named] if isinstance(named, str) else list(named or ["hidden_states"])
            readers.append(LayerReader(network, layers, role))
            stack.callback(readers[-1].remove)
        both = BothNetworks(a, b, readers, sample_axis, limits, least, feature_layout)
        batches = _batches(data, samples, batch_size, collator or default_data_collator)
        of_batches = ((found, both.row_of) for batch in batches if (found := both.layers(batch)) is not None)
        values = _streamed(of_batches, measure) if streams else _at_once(of_batches, chosen)
        if values is None:
            kind = "rows" if streams and sample_axis == "token" else "samples"
            raise ValueError(
                f"no batch of the data has the {least} {kind} that {measure} needs ({both.rows} rows were read, "
                f"with samples={samples} and batch_size={batch_size}): raise what is too small."
            )
        names = [reader.names() for reader in readers]
    return Comparison(layers_a=names[0], layers_b=names[1], measure=measure, sample_axis=sample_axis, **values)


def _checked(measure: str, sample_axis: str, samples: int | None, batch_size: int) -> Measure:
    """Return the measure, or raise ValueError for settings that compare nothing."""
    if sample_axis not in SAMPLE_WORDS:
        raise ValueError(f"sample_axis is {sample_axis!r}; possible are {', '.join(SAMPLE_WORDS)}.")
    given = [batch_size, *([] if samples is None else [samples])]
    if not all(isinstance(number, int) and number >= 1 for number in given):
        raise ValueError(f"batch_size is {batch_size!r} and samples {samples!r}; expected whole numbers of at least 1.")
    if measure == "linear_cka" and sample_axis == "within":
        raise ValueError("linear_cka within rows depends on how many positions they have: use debiased_cka.")
    return get_measure(measure)


def _streamed(batches: Iterable[tuple[OfBoth, Tensor | None]], measure: str) -> dict[str, Any] | None:
    """Compare all layers over batches by CKA; None if there are no samples."""
    sums = HSICSums()
    for of_both, row_of in batches:
        if row_of is not None and len(row_of.unique()) < FEWEST:
            continue
        for group in range(len(next(iter(of_both[0].values())))):
            of_a, of_b = ([side[name][group] for name in side] for side in of_both)
            if of_a[0].samples >= FEWEST:
                sums.add(of_a, of_b, row_of)
    if not sums.batches:
        return None
    values, errors = sums.debiased() if measure == "debiased_cka" else sums.linear()
    deviations = None if errors is None else errors.numpy()
    return {"values": values.numpy(), "errors": deviations, "samples": sums.samples, "batches": sums.batches}


def _at_once(batches: Iterable[tuple[OfBoth, Tensor | None]], measure: Measure) -> dict[str, Any] | None:
    """Compare all layers on the first batch by any measure; None if there is none."""
    first = next(iter(batches), None)
    if first is None:
        return None
    layers, _ = first
    pairs = list(product(layers[0], layers[1]))
    values = guidance_loss_of_groups(pairs, measure, *layers)[1]
    count = sum(layer.samples * layer.rows for layer in next(iter(layers[0].values())))
    found = np.array(list(map(float, values.values()))).reshape(len(layers[0]), len(layers[1]))
    return {"values": found, "samples": count, "batches": 1}


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
