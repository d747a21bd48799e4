"""The guide's side of a step: from the batch, by its forward or its cached features, to its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.features.batch import Batch, documents_of, is_packed, take_rows
from hf_guidance.features.reader import AllRead, LayerReader, Reduce
from hf_guidance.features.samples import Samples
from hf_guidance.guide.cache import WITHOUT_HALVES, GuideCache, format_of
from hf_guidance.guide.calling import forward
from hf_guidance.guide.inputs import (
    check_own_columns,
    check_vocabularies,
    generator_for,
    guide_batch,
    noise_like,
    seen_by,
    shuffle_rows,
    vocabulary_size,
)
from hf_guidance.guide.random_state import fingerprint
from hf_guidance.guide.sharding import is_sharded
from hf_guidance.mapping import LAST
from hf_guidance.similarity.layers import Layer, flat
from hf_guidance.similarity.sketch import Sketch

logger = logging.getLogger(__name__)

ALIKE = 0.02  # largest relative difference that rounding makes, in half precision too
SAME = 1e-3  # the same for two forwards of one batch
MOST_STAYING = 0.1  # share of the first batch's rows that may keep their place where rows of equal length are exchanged


class GuideRunning:
    """Guide that runs once per batch, only as far as needed, or whose features come from the cache.

    Args:
        reader: Reader of the guide's layers.
        target: Network that it guides, which may make decoder inputs for both.
        config: Settings of guidance.
        autocast: Makes the context of the forward.
    """

    def __init__(
        self,
        reader: LayerReader,
        target: nn.Module,
        config: GuidanceConfig,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.reader, self.guide, self.target = reader, reader.model, target
        self.config, self.autocast = config, autocast
        self.sketch = None if config.sketch is None else Sketch(config.sketch, "guide")
        self.cache: GuideCache | None = None
        self._sketched_layers: set[str] = set()  # of the cache
        self._ends_early: bool | None = None  # whether a forward may end after the last layer in a pair
        self._has_seen_a_batch = False
        self._draws_nothing = False  # no random numbers, or none that change a layer

    def names(self) -> list[str]:
        """Return the guide's layers in order. A batch must have been seen."""
        return self.reader.names() if self.cache is None else list(self.cache.widths)

    @torch.no_grad()
    def layers(
        self, batch: Batch, key: tuple[int, ...], samples_of: Callable[[Batch], Samples]
    ) -> tuple[Samples, dict[str, tuple[Layer, ...]]]:
        """Run the guide on its input, and make its layers.

        Args:
            batch: Columns for both networks.
            key: (seed, step, micro-step, rank), from which noise and shuffling are drawn.
            samples_of: Makes the samples of the guide's input.

        Returns:
            The guide's samples, and layer → its values.

        Raises:
            ValueError: If the two networks have different vocabularies or rows, or `cache_guide` is set but the cache
                is not open or the batch has no ids.
        """
        check_own_columns(batch)
        inputs = guide_batch(batch, self.target, self.guide)
        if not self._has_seen_a_batch:
            if not self.config.guide_shares_tokenizer:
                check_vocabularies(self.target, self.guide, {*batch, *inputs})
            if is_packed(inputs):
                self._check_tells_documents_apart(inputs)
            self._has_seen_a_batch = True
        if self.config.guide_input == "noise":
            inputs = noise_like(inputs, vocabulary_size(self.guide), generator_for(*key, 1))
        samples = samples_of(inputs)
        if self.config.cache_guide is None:
            return samples, self.read(inputs, samples.layers)
        if self.cache is None:
            raise ValueError("cache_guide is set: call open_cache once before the first step, as GuidanceTrainer does.")
        ids, seen = self._ids(batch), seen_by(self.guide, inputs)
        features = self.cache.features(ids, seen, lambda rows: self.read(take_rows(inputs, rows), self._sketched))
        assert self.sketch is not None
        parts = {name: self.sketch.parts if name in self._sketched_layers else 1 for name in features}
        wanted = [name for name in features if self.reader.keep is None or name in self.reader.keep]
        return samples, {name: samples.layers(name, features[name], parts[name]) for name in wanted}

    def shuffled(self, batch: Batch, key: tuple[int, ...]) -> Batch:
        """Exchange the rows of a batch; rows of equal length, if positions are compared.

        Args:
            batch: Columns for both networks.
            key: As of `layers`.

        Raises:
            ValueError: If more than a tenth of the first batch's rows have a length that no other has. In later batches
                such rows keep their place, so that no run is lost to a batch that happens to be ragged.
        """
        own = None if self.config.sample_axis == "sequence" else guide_batch(batch, self.target, self.guide)
        most = 1.0 if self._has_seen_a_batch else MOST_STAYING
        return shuffle_rows(batch, generator_for(*key, 2), own, most)

    def read(self, inputs: Batch, reduce: Reduce) -> dict[str, Any]:
        """Run one forward, and reduce each layer as soon as it is computed. It ends after the last layer in a pair."""
        if self._ends_early is None:
            own_forward = getattr(self.guide.forward, "__func__", None) is type(self.guide).forward
            placed = hasattr(self.guide, "hf_device_map")  # weights are fetched for each forward and put back
            self._ends_early = own_forward and not (placed or is_sharded(self.guide))  # whose end puts weights back
        self.reader.stop_early = self._ends_early and self.cache is None
        before = None if self._draws_nothing else fingerprint()
        with self.autocast(), self.reader.reading(reduce) as read, suppress(AllRead):
            forward(self.guide, inputs)
        if before is not None:
            self._draws_nothing = True
            if before != fingerprint():
                self._check_is_not_random(inputs)
        return read

    def _check_is_not_random(self, inputs: Batch) -> None:
        """Refuse a guide whose features differ between two forwards of one batch."""
        once, again = (self.read(inputs, lambda _, features: features.clone()) for _ in range(2))
        for name, features in once.items():
            same = features.shape == again[name].shape
            difference = (features - again[name]).norm() / features.norm() if same else 1.0
            if difference > SAME:
                raise ValueError(
                    f"the guide ({type(self.guide).__name__}) is random: two forwards of the same batch differ by "
                    f"{100 * difference:.2g} % in layer {name}, so that the target would follow noise. Switch this off "
                    "in the guide's config, or load the guide without it: of a masked autoencoder that is its plain "
                    "encoder (the weights of ViTMAEModel in ViTModel)."
                )

    def _check_tells_documents_apart(self, inputs: Batch) -> None:
        """Warn if the guide's features of a packed document differ from those of the document alone."""
        documents = documents_of(inputs)
        columns = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim == 2}
        if len(documents) < 2 or "input_ids" not in columns:
            return
        place = documents[1]  # the first document has nothing before it
        alone = {name: columns[name][:, place] for name in columns.keys() & {"input_ids", "position_ids"}}
        together, apart = (self.read(batch, lambda _, output: output) for batch in (inputs, alone))
        for name, features in apart.items():
            packed = together[name][:, place]
            difference = (packed - features).norm() / features.norm()
            if not difference < ALIKE:
                logger.warning(
                    "The guide (%s) does not tell packed documents apart: features of the second document differ by "
                    "%.0f %% from those of the document alone (%s). Pad the rows instead of packing them, or use "
                    "another guide.",
                    type(self.guide).__name__,
                    100 * difference,
                    name,
                )
                return

    @torch.no_grad()
    def open_cache(self, batch: Batch, rows: int, identity: Mapping[str, Json], create: bool) -> None:
        """Open or create the cache, as `GuidanceLoss.open_cache` does."""
        assert self.config.cache_guide is not None
        assert self.sketch is not None
        inputs, ids = guide_batch(batch, self.target, self.guide), self._ids(batch)
        if format_of(self.config.cache_guide) == WITHOUT_HALVES:
            logger.warning(
                "%s was made by an earlier version of hf_guidance, whose sketches make the norms of Gram matrices too "
                "large: similarities are too low. Remove it to have it made anew.",
                self.config.cache_guide,
            )
            self.sketch = Sketch(self.config.sketch or 0, "guide", parts=1)
        if Samples(inputs).masks:
            raise ValueError(
                "cache_guide stores equally many numbers for every sample, but these rows have an attention_mask or "
                "decoder inputs, and the features of padded rows depend on their batch. Leave the mask out if all rows "
                "have the same length, or leave cache_guide out."
            )
        precision = []

        def sketched(name: str, features: Tensor) -> Tensor:
            precision.append(str(features.dtype))
            found = self._sketched(name, features)
            if found.numel() != features.numel():
                self._sketched_layers.add(name)
            return found

        read = self.read(inputs, sketched)
        features = {name: read[name] for name in self.reader.names()}  # in the order of pairing
        if match := LAST.fullmatch(self.config.layer_mapping):
            features = dict(list(features.items())[-int(match[1]) :])
        kind = next(iter(features.values())).device.type
        with self.autocast():  # hidden states are float32 under it, too
            autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        identity = {**identity, "sketch": self.sketch.size, "precision": precision[0], "autocast": autocast}
        seen = seen_by(self.guide, inputs)
        self.cache = GuideCache(self.config.cache_guide, features, ids, seen, rows, identity, create)

    def _sketched(self, name: str, features: Tensor) -> Tensor:
        assert self.sketch is not None
        return self.sketch(name, flat(features))

    def _ids(self, batch: Batch) -> Tensor:
        column = str(self.config.sample_id_column)
        if not isinstance(ids := batch.get(column), Tensor):
            raise ValueError(
                f"the batch has {sorted(batch)}, but no column of sample ids {column!r}: add one with "
                f"dataset.add_column({column!r}, range(len(dataset))), and let the collator pass it on as a tensor."
            )
        return ids
