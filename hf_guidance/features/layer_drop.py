"""LayerDrop: which layers of a network ran in a training forward, and which layer each hidden state belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_guidance.features.layer_stacks import (
    Stack,
    in_words,
    rate_of,
    rate_setting,
    remedy,
    settings_of,
    stack_around,
    stack_of,
)


class LayerDrop:
    """Layers that a network may skip in training, and a record of which of them ran in the last forward.

    The index of a hidden state does not tell which layer it belongs to. transformers leaves out the states of skipped
    layers (`capture_outputs`), or repeats the input of a skipped layer. Hooks on the layers tell which ran.

    Args:
        network: Network that is called.
        base: Network inside it, by whose module names layers are named.
        kinds: Tuples of hidden states to read, such as `encoder_hidden_states`.
        modules: Names of the modules to read.

    Attributes:
        settings: LayerDrop settings with their values that may skip a layer to read, such as `decoder_layerdrop`. Empty
            if no such layer can be skipped.
        has_rate: Whether the network has a LayerDrop rate at all, be it 0.

    Raises:
        ValueError: If hidden states are to be read of a network with LayerDrop whose layers cannot be identified.

    Source: Fan et al. 2020 (arXiv 1909.11556).
    """

    def __init__(self, network: nn.Module, base: nn.Module, kinds: Iterable[str], modules: Iterable[str]) -> None:
        self.settings: dict[str, float] = {}
        self._stacks: dict[str, Stack] = {}  # by kind of hidden states
        self._around: dict[str, Stack] = {}  # by module to read, with the one layer around it
        self._ran: dict[str, Any] = {}  # outputs by layer during a forward, then names only
        self._is_reading = False
        self._watched: dict[nn.Module, list[str]] = {}  # modules with layers that may be skipped
        self._layers: dict[nn.Module, list[str]] = {}
        self._handles: list[Any] = []
        self._rates: list[tuple[nn.Module, float]] = []
        self.has_rate = False
        if not any(p.requires_grad for p in base.parameters()):
            return  # a frozen network runs in evaluation mode, which skips nothing
        settings = {setting: module for module in base.modules() if (setting := rate_setting(module)) is not None}
        self._rates = [(module, rate_of(module)) for module in settings.values()]
        self.has_rate = bool(self._rates)
        if not any(rate for _, rate in self._rates):
            return
        self._stacks = {kind: stack for kind in dict.fromkeys(kinds) if (stack := stack_of(base, kind))}
        self._around = {name: stack for name in modules if (stack := stack_around(base, name))}
        for owner, layers in (*self._stacks.values(), *self._around.values()):
            module = base.get_submodule(owner)
            self.settings |= settings_of(base, module)
            seen_in = module if owner else network  # PEFT calls the base model's forward without its hooks
            self._watched.setdefault(seen_in, []).append(owner)
            for layer in layers:
                self._layers.setdefault(base.get_submodule(layer), []).append(layer)
        self.attach()

    def attach(self) -> None:
        """Put the hooks on the network, unless they are there."""
        if self._handles:
            return
        for module, names in self._watched.items():
            self._handles += [module.register_forward_pre_hook(partial(self._note, name)) for name in names]
        for module, names in self._layers.items():
            self._handles += [module.register_forward_hook(partial(self._note, name)) for name in names]

    def start(self) -> None:
        """Start to watch a forward.

        Raises:
            ValueError: If the LayerDrop rate has changed since this object was made.
        """
        for module, rate in self._rates:
            if (now := rate_of(module)) != rate:
                raise ValueError(
                    f"the layerdrop of {type(module).__name__} was {rate:g} when guidance looked for its layers, but "
                    f"now it is {now:g}: set it before you make the trainer."
                )
        self._ran, self._is_reading = {}, True

    def stop(self) -> None:
        """Stop watching. Keep only which layers ran, not their outputs."""
        self._ran, self._is_reading = dict.fromkeys(self._ran), False

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, name: str, module: nn.Module, args: Any, output: Any = None) -> None:
        if self._is_reading:
            self._ran[name] = output

    def has_run(self) -> bool:
        """Tell whether the last forward reached a module that may skip its layers."""
        return any(owner in self._ran for owner, _ in (*self._stacks.values(), *self._around.values()))

    def has_skipped(self, name: str) -> bool:
        """Tell whether the last forward skipped the layer of a hidden state or module.

        It counts as skipped only if the forward reached the module around the layer. Index 0 of the hidden states is
        missing if no layer ran.
        """
        kind, _, index = name.rpartition(".")
        owner, layers = self._around.get(name, ("", []))
        if kind in self._stacks:
            owner, every = self._stacks[kind]
            layers = every[int(index) - 1 : int(index)] if int(index) else every
        return bool(layers) and owner in self._ran and not any(layer in self._ran for layer in layers)

    def in_full(self, kind: str, states: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Put each hidden state at its index in the full network, and None for layers that did not run.

        Index 0 is the input of the first layer that ran. If the last layer did not run, transformers returns the normed
        final state as the state of the last layer that ran. The layer's own output then replaces it.

        Args:
            kind: Name of the tuple of hidden states.
            states: Hidden states that the network returned.

        Returns:
            One entry for each layer, and one for the embeddings.

        Raises:
            ValueError: If the number of hidden states does not match the layers that ran.
        """
        if kind not in self._stacks:
            return states
        owner, layers = self._stacks[kind]
        ran = [i for i, layer in enumerate(layers) if layer in self._ran]
        full: list[Any] = [None] * (len(layers) + 1)
        if owner in self._ran and len(states) == len(full):
            for i in (0, *(i + 1 for i in ran)):
                full[i] = states[i]
        elif owner in self._ran and (len(states) == len(ran) + 1 or not (states or ran)):
            for i, state in zip((0, *(i + 1 for i in ran)), states, strict=False):
                full[i] = state
            if ran and ran[-1] + 1 < len(layers):
                full[ran[-1] + 1] = self._ran[layers[ran[-1]]]
        else:
            raise ValueError(
                f"the target returned {len(states)} {kind}, but {len(ran)} of the {len(layers)} layers "
                f"{layers[0]} … {layers[-1]} ran, so {len(ran) + 1} or {len(full)} were expected. With LayerDrop it "
                f"is then not known which layer each state belongs to: {remedy(self.settings)}, or name modules with "
                "target_layers."
            )
        return full

    def check_similarity_batch(self, similarity_batch: str) -> None:
        """Raise ValueError for a similarity over several batches, since LayerDrop skips other layers in each."""
        if self.settings and similarity_batch != "local":
            raise ValueError(
                f"similarity_batch={similarity_batch!r} compares a layer over several batches, but LayerDrop skips "
                f"other layers in each of them ({in_words(self.settings)}): {remedy(self.settings)}, or use "
                "similarity_batch='local'."
            )
