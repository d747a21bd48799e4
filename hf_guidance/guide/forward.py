"""The guide's side of a step: what of a batch each network sees, and the guide's forward or cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guidance.config import GuidanceConfig, Json
from hf_guidance.features.batch import Batch, is_packed, take_rows
from hf_guidance.features.reader import AllRead, LayerReader, Reduce, base_model_of
from hf_guidance.features.rows import check_is_batch, valid_positions
from hf_guidance.features.samples import Samples
from hf_guidance.guide.cache import WITHOUT_HALVES, GuideCache, format_of
from hf_guidance.guide.failures import is_from_here, why_it_fails
from hf_guidance.guide.first_forwards import check_is_not_random, warn_if_documents_mix
from hf_guidance.guide.inputs import (
    BESIDE_INPUTS,
    GUIDE_PREFIX,
    MAIN_INPUTS,
    check_own_columns,
    check_vocabularies,
    decoder_inputs,
    noise_like,
    shuffle_rows,
    vocabulary_size,
)
from hf_guidance.guide.random_state import drawn_from
from hf_guidance.guide.sharding import is_sharded
from hf_guidance.mapping import LAST
from hf_guidance.similarity.layers import Layer, flat
from hf_guidance.similarity.sketch import Sketch

logger = logging.getLogger(__name__)

LABELS = {"labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label"}
MOST_STAYING = 0.1  # share of the first batch's rows that may keep their place where rows of equal length are exchanged


def generator_for(*key: int) -> torch.Generator:
    """Make a generator whose seed is a function of (seed, step, micro-step, rank, …). No state needs to be saved."""
    state = 0
    for number in key:
        state = (state * 6364136223846793005 + int(number) + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)


def accepted_columns(network: nn.Module) -> list[str]:
    """Return the names of the arguments of a network's forward, without labels."""
    parameters = inspect.signature(base_model_of(network).forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.kind not in variadic and p.name not in LABELS]


def without_guide(batch: Batch, ids: str | None = None) -> dict[str, Any]:
    """Return the target's columns of a batch.

    Args:
        batch: Columns for both networks.
        ids: Column of sample ids to leave out, too.
    """
    check_is_batch(batch)
    return {name: value for name, value in batch.items() if not name.startswith(GUIDE_PREFIX) and name != ids}


def seen_by_target(batch: Batch, target: nn.Module) -> dict[str, Any]:
    """Return a batch with the inputs that its target is run on, even where these are made from other columns.

    An encoder-decoder makes its decoder inputs by shifting the labels. TRL's trainers that generate, GRPO and RLOO,
    join prompts and completions into `input_ids` and `attention_mask`.
    """
    check_is_batch(batch)
    seen: dict[str, Any] = dict(batch)
    given = seen.keys() & {"decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values"}
    network = base_model_of(target)
    has_decoder = hasattr(network, "prepare_decoder_input_ids_from_labels") or getattr(
        getattr(network, "config", None), "is_encoder_decoder", False
    )
    if has_decoder and seen.get("labels") is not None and not given:
        seen |= decoder_inputs(network, seen)
    parts = {"input_ids": ("prompt_ids", "completion_ids"), "attention_mask": ("prompt_mask", "completion_mask")}
    if "input_ids" not in seen and all(name in seen for names in parts.values() for name in names):
        seen |= {whole: torch.cat([seen[name] for name in names], 1) for whole, names in parts.items()}
    return seen


def guide_batch(batch: Batch, target: nn.Module, guide: nn.Module) -> dict[str, Any]:
    """Return the guide's columns of a batch: `guide_*` without the prefix if there are any, else all columns.

    A guide that sees the images of a batch with images and text is not given the columns of the text, nor one without
    a decoder those of a decoder: their masks are none of its layers.
    """
    own = {k.removeprefix(GUIDE_PREFIX): v for k, v in batch.items() if k.startswith(GUIDE_PREFIX)}
    if own:
        return own
    accepted, seen = accepted_columns(guide), seen_by_target(batch, target)
    sees_images = "pixel_values" in accepted and "input_ids" not in accepted
    of_text = {"input_ids", *BESIDE_INPUTS} if {"pixel_values", "input_ids"} <= seen.keys() and sees_images else set()
    has_decoder = any(name.startswith("decoder_") for name in accepted)
    of_decoder = set() if has_decoder else {"decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"}
    return {name: value for name, value in seen.items() if name not in of_text | of_decoder}


def forward_arguments(network: nn.Module, batch: Batch, role: str = "guide") -> tuple[list[Any], dict[str, Any]]:
    """Choose the arguments of a network's forward: accepted columns by name, else its one input by position.

    Args:
        network: The network.
        batch: Columns of a batch.
        role: What it is, for the message: `guide`, which may have columns of its own, or another word.

    Returns:
        Positional and keyword arguments.

    Raises:
        ValueError: If the network accepts none of the columns.
    """
    accepted = accepted_columns(network)
    named = {name: batch[name] for name in accepted if name in batch}
    main = next((name for name in MAIN_INPUTS if name in batch), None)
    has_main = main is None or main in named or accepted[0] in named
    if has_main and any(isinstance(value, Tensor) for value in named.values()):
        return [], named
    if main is None or not accepted:
        own = f", prefixed with '{GUIDE_PREFIX}' if they are for the guide alone" if role == "guide" else ""
        raise ValueError(
            f"the {role} ({type(network).__name__}) takes {accepted}, but the batch has {sorted(batch)}: name the "
            f"columns after its arguments{own}."
        )
    return [batch[main]], named


def seen_by(network: nn.Module, inputs: Batch) -> dict[str, Any]:
    """Select the inputs that a network's forward accepts. Positional ones are named by their number."""
    args, kwargs = forward_arguments(network, inputs)
    return {**dict(zip(map(str, range(len(args))), args, strict=True)), **kwargs}


def rows_for_guide(batch: Batch, rows: Tensor | None) -> tuple[Batch, Tensor | None]:
    """Select the rows that the guide runs on.

    Args:
        batch: Columns for both networks.
        rows: Indices of the rows to compare, `(k,)`; None for all.

    Returns:
        The batch of these rows, and which of its rows to compare; None for all. A batch of no row is one of the first
        row, none of which is compared, because few networks run on no row.
    """
    if rows is None:
        return batch, None
    return (take_rows(batch, rows), None) if len(rows) else (take_rows(batch, rows.new_zeros(1)), rows)


def forward(network: nn.Module, inputs: Batch, role: str = "guide") -> Any:
    """Run a network on those of the inputs that it accepts, moved to its device.

    Args:
        network: The network.
        inputs: Columns of a batch.
        role: As of `forward_arguments`.

    Returns:
        Output of the network.

    Raises:
        ValueError: If it does not run on these inputs. The message has the network's own error and what to do.
    """
    args, kwargs = forward_arguments(network, inputs, role)
    if "use_cache" in accepted_columns(network):  # with a cache, transformers takes packed documents for one document
        kwargs["use_cache"] = False
    mask = kwargs.get("attention_mask")
    if (
        isinstance(mask, Tensor)
        and mask.ndim == 2
        and mask.is_floating_point()
        and isinstance(base_model_of(network), PreTrainedModel)
    ):
        kwargs["attention_mask"] = valid_positions(mask).long()  # transformers takes 0 for padding
    parameter = next(base_model_of(network).parameters(), None)  # a target's own base holds none itself
    if parameter is not None and parameter.device.type != "meta":
        args = [value.to(parameter.device) for value in args]
        kwargs = {k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    try:
        return network(*args, **kwargs)
    except (AllRead, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_from_here(error):
            raise
        raise ValueError(why_it_fails(network, inputs, args, kwargs, error, role)) from error


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
        if any(name.startswith(GUIDE_PREFIX) for name in batch):
            check_own_columns(batch)
        inputs = guide_batch(batch, self.target, self.guide)
        if not self._has_seen_a_batch:
            if not self.config.guide_shares_tokenizer:
                check_vocabularies(self.target, self.guide, {*batch, *inputs})
            if is_packed(inputs):
                warn_if_documents_mix(self.guide, self.read, inputs)
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
        before = None if self._draws_nothing else drawn_from()
        with self.autocast(), self.reader.reading(reduce) as read, suppress(AllRead):
            forward(self.guide, inputs)
        if before is not None:
            self._draws_nothing = True
            if before != drawn_from():
                check_is_not_random(self.guide, self.read, inputs)
        return read

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
