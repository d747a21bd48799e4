"""How a network lays out what its layers give: places of an image, frames of a sound."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.features.reader import LayerReader, base_model_of

OVER_SEQUENCE = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d)
SIZES = ("out_channels", "out_features", "num_features", "normalized_shape")  # of layers with weights
FRAMES = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")  # as transformers names them


class Conventions:
    """Conventions of one network, by which its layers' outputs become samples.

    Args:
        model: The network.
        modules: Its named modules that are read.
        reader: Reader of the network, which knows what its hidden states are of; None for named modules alone.
        layout: `channels_first` or `channels_last` where weights and shape leave it open; `auto` raises an error there.

    Attributes:
        queries: Layers whose positions are queries of a decoder, as of DETR, which no input's mask describes.
        over_sequence: Convolutions over a sequence, whose outputs are `(batch, channels, length)`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        layout: str = "auto",
        reader: LayerReader | None = None,
    ) -> None:
        self.model, self.modules, self.layout, self.reader = base_model_of(model), modules, layout, reader
        self.queries = set() if reader is None else reader.queries
        self.over_sequence = {name for name, module in modules.items() if isinstance(module, OVER_SEQUENCE)}
        self.has_said_padding_counts = False
        self._sizes: dict[str, set[int]] = {}
        found = (getattr(module, name, None) for name in FRAMES for module in self.model.modules())
        self._frames: Any = next((method for method in found if method is not None), None)
        if self._frames is not None and "add_adapter" in inspect.signature(self._frames).parameters:
            self._frames = partial(self._frames, add_adapter=False)  # which comes after the layers

    def virtual_tokens(self) -> int:
        """Return how many tokens PEFT's adapters put in front of each row, as prompt tuning does."""
        adapters = getattr(getattr(self.reader, "model", None), "peft_config", None) or {}
        return max((getattr(config, "num_virtual_tokens", None) or 0 for config in adapters.values()), default=0)

    def to_frames(self, lengths: Tensor) -> Tensor | None:
        """Compute into how many frames the network joins sounds of these lengths; None if it does not tell."""
        if self._frames is None:
            return None
        frames = [self._frames(length) for length in lengths.cpu()]  # some take one length only
        frames = [value[0] if isinstance(value, tuple) else value for value in frames]
        return torch.tensor([max(0, int(value)) for value in frames], device=lengths.device)

    def places(self, name: str, features: Tensor) -> Tensor:
        """Turn the map of an image into its places.

        Args:
            name: Name of the layer.
            features: Its output, `(batch, channels, height, width)` or `(batch, height, width, channels)`.

        Returns:
            `(batch, places, channels)`.

        Raises:
            ValueError: If the layout is neither certain from weights and shape nor named.
        """
        layout = self._layout(name, features)
        if layout == "auto":
            raise ValueError(
                f"layer {name!r} gave shape {tuple(features.shape)}, of which the axis of channels is not certain: set "
                "feature_layout='channels_first' or 'channels_last', or sample_axis='sequence'."
            )
        return features.flatten(2).transpose(1, 2) if layout == "channels_first" else features.flatten(1, 2)

    def _layout(self, name: str, features: Tensor) -> str:
        """Tell the layout by the numbers of channels that the module's weights have, and by a square map."""
        if name not in self._sizes:
            own = _sizes_of(self.modules[name]) if name in self.modules else set()
            self._sizes[name] = own or _sizes_of(self.model)
        _, first, middle, last = features.shape
        by_weights = first in self._sizes[name], last in self._sizes[name]
        by_shape = middle == last != first, first == middle != last
        said = {fits for fits in (by_weights, by_shape) if fits[0] != fits[1]}
        if len(said) != 1:  # nothing is, or they contradict each other, as where a block joins its inputs
            return self.layout
        return "channels_first" if said.pop()[0] else "channels_last"


def _sizes_of(network: nn.Module) -> set[int]:
    sizes: set[int] = set()
    for module in network.modules():
        for name in SIZES:
            size = getattr(module, name, None)
            sizes |= {size} if isinstance(size, int) else set(size[-1:]) if isinstance(size, tuple) else set()
    return sizes
