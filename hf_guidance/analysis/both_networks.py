"""The layers of two networks on the same batch, for their comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hf_guidance.features.batch import Batch
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.reader import LayerReader
from hf_guidance.features.rows import content_of
from hf_guidance.features.samples import Samples
from hf_guidance.guide.forward import forward, guide_batch, seen_by_target, without_guide
from hf_guidance.guide.inputs import check_own_columns
from hf_guidance.guide.random_state import drawn_from
from hf_guidance.similarity.layers import Layer

OfBoth: TypeAlias = list[dict[str, tuple[Layer, ...]]]  # layers of a, and of b, by name

MAX_TOKENS = 1024  # of a batch
# of messages about guidance, and what they mean here
WORDS = (
    (r"\btarget_layers\b", "layers_a"),
    (r"\bguide_layers\b", "layers_b"),
    (r"\btarget layer\b", "layer of a"),
    (r"\bguide layer\b", "layer of b"),
    (r"\bthe target\b", "network a"),
    (r"\bthe guide\b", "network b"),
    (r", or skip_first_positions=1 if one of them has a class token", ""),
)


class BothNetworks:
    """Two networks whose layers are read on the same batches.

    Args:
        a: The first network.
        b: The second one.
        readers: Readers of the layers of each.
        axis: The sample axis.
        limits: `primal_below` of the layers of each.
        least: Fewest samples that a batch needs.
        layout: The `feature_layout` of both.

    Attributes:
        rows: Number of rows that were read.
        row_of: Row of the last batch that each sample comes from, `(n,)`; None if each has its own.
    """

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
        self.networks, self.readers, self.axis, self.limits, self.least = (a, b), readers, axis, limits, least
        self.conventions = [Conventions(r.model, r.modules, layout, r) for r in readers]
        self.rows, self._draws_nothing = 0, False
        self.row_of: Tensor | None = None

    def layers(self, batch: Batch) -> OfBoth | None:
        """Run both networks on a batch, and return the layers of each; None if it has too few samples.

        Args:
            batch: Columns of both networks.

        Raises:
            ValueError: If a network does not run, is random or not finite, or both have other samples.
        """
        check_own_columns(batch)
        seed, self.rows = self.rows, self.rows + len(content_of(batch))
        inputs = seen_by_target(without_guide(batch), self.networks[0]), guide_batch(batch, *self.networks)
        ours = self._samples(inputs[0], 0, seed)
        if ours.count < (self.least if self.axis == "sequence" else 1):
            return None
        of_a = self._read(inputs[0], 0, ours)
        theirs = self._samples(inputs[1], 1, seed, like=ours)
        of_b = self._read(inputs[1], 1, theirs)
        ours.check_aligned(list(product(of_a, of_b)), of_a, theirs, of_b)
        self._draws_nothing = True
        self.row_of = ours.rows_of_tokens() if self.axis == "token" else None
        fewest = max(layer.samples for layer in next(iter(of_a.values())))
        return [of_a, of_b] if fewest >= self.least else None

    def _samples(self, inputs: Batch, number: int, seed: int, like: Samples | None = None) -> Samples:
        return Samples(
            inputs,
            self.axis,
            MAX_TOKENS,
            seed,
            least=self.least,
            like=like,
            primal_below=self.limits[number],
            conventions=self.conventions[number],
        )

    def _read(self, inputs: Batch, number: int, samples: Samples) -> dict[str, tuple[Layer, ...]]:
        """Run a network, and check that its features are always the same and finite."""
        network, reader, name = self.networks[number], self.readers[number], "ab"[number]
        before = None if self._draws_nothing else drawn_from()
        with reader.reading(samples.layers) as read:
            forward(network, inputs, ("target", "guide")[number])
        if before is not None and before != drawn_from():
            raise ValueError(
                f"network {name} ({type(network).__name__}) draws random numbers in evaluation mode, so that its "
                "features are never twice the same: switch this off in its config, or take its plain encoder."
            )
        found = {layer: read[layer] for layer in reader.names() if layer in read}
        for layer, groups in found.items():
            if not all(bool(group.values.isfinite().all()) for group in groups):
                raise ValueError(
                    f"layer {layer!r} of network {name} has features that are not finite: look for them in its "
                    "weights or in the data."
                )
        return found


@contextmanager
def in_words() -> Iterator[None]:
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
def as_they_were(a: nn.Module, b: nn.Module, device: torch.device | str | None) -> Iterator[None]:
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
