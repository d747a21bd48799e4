"""LayerDrop: which layers of a network in training ran in a forward, and whose output each hidden state is."""

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
    """The layers that a network in training may skip, and which of them ran in the last forward.

    The place of a hidden state does not say whose it is: transformers leaves out those of skipped layers
    (`capture_outputs`), or repeats what would have gone into such a layer. Hooks on the layers themselves do.

    Args:
        network: what is called.
        base: the network in it by which modules are named.
        kinds: the tuples of hidden states that are read, such as ``encoder_hidden_states``.
        modules: names of the modules that are read.

    Attributes:
        settings: what makes layers that are read be skipped, as ``decoder_layerdrop``, with its value; none if no
            layer is.

    Raises:
        ValueError: hidden states of a network with LayerDrop whose layers cannot be told apart.

    Source: Fan et al. 2020 (arXiv 1909.11556).
    """

    def __init__(self, network: nn.Module, base: nn.Module, kinds: Iterable[str], modules: Iterable[str]) -> None:
        self.settings: dict[str, float] = {}
        self._stacks: dict[str, Stack] = {}  # by the kind of hidden states that they give
        self._around: dict[str, Stack] = {}  # by a module that is read, with the one layer that it is in
        self._ran: dict[str, Any] = {}  # by name; with the outputs of layers while a forward is read
        self._is_reading = False
        self._handles: list[Any] = []
        self._rates: list[tuple[nn.Module, float]] = []
        if not any(p.requires_grad for p in base.parameters()):
            return  # what is not trained runs in evaluation mode, which skips nothing
        settings = {setting: module for module in base.modules() if (setting := rate_setting(module)) is not None}
        self._rates = [(module, rate_of(module)) for module in settings.values()]
        if not any(rate for _, rate in self._rates):
            return
        self._stacks = {kind: stack for kind in dict.fromkeys(kinds) if (stack := stack_of(base, kind))}
        self._around = {name: stack for name in modules if (stack := stack_around(base, name))}
        for owner, layers in (*self._stacks.values(), *self._around.values()):
            module = base.get_submodule(owner)
            self.settings |= settings_of(base, module)
            seen_in = module if owner else network  # PEFT calls the forward of its base model past the hooks of it
            self._handles.append(seen_in.register_forward_pre_hook(partial(self._note, owner)))
            for layer in layers:
                self._handles.append(base.get_submodule(layer).register_forward_hook(partial(self._note, layer)))

    def start(self) -> None:
        """Begin to watch a forward.

        Raises:
            ValueError: LayerDrop was turned on, off or to another rate since this was made.
        """
        for module, rate in self._rates:
            if (now := rate_of(module)) != rate:
                raise ValueError(
                    f"the layerdrop of {type(module).__name__} was {rate:g} when guidance looked for its layers, and "
                    f"now it is {now:g}: set it before the trainer is made."
                )
        self._ran, self._is_reading = {}, True

    def stop(self) -> None:
        """Watch no longer, and keep of the forward only what ran in it."""
        self._ran, self._is_reading = dict.fromkeys(self._ran), False

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, module: nn.Module, args: Any, output: Any = None) -> None:
        if self._is_reading:
            self._ran[name] = output

    def has_run(self) -> bool:
        """Whether the last forward came to a module that may skip its layers."""
        return any(owner in self._ran for owner, _ in (*self._stacks.values(), *self._around.values()))

    def has_skipped(self, name: str) -> bool:
        """Whether the last forward came to where this hidden state or module is, and skipped its layer.

        Index 0 of the hidden states is lost where no layer ran.
        """
        kind, _, index = name.rpartition(".")
        owner, layers = self._around.get(name, ("", []))
        if kind in self._stacks:
            owner, every = self._stacks[kind]
            layers = every[int(index) - 1 : int(index)] if int(index) else every
        return bool(layers) and owner in self._ran and not any(layer in self._ran for layer in layers)

    def in_full(self, kind: str, states: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Put each hidden state where it is if no layer is skipped, and None for those of layers that did not run.

        Index 0 is what goes into the first layer that ran. Where the last layer did not run, transformers returns the
        final state, normed, as that of the last one that did: the layer's own output takes its place.

        Raises:
            ValueError: another number of hidden states than follows from the layers that ran.
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
                f"the target returned {len(states)} {kind}, and {len(ran)} of the {len(layers)} layers "
                f"{layers[0]} … {layers[-1]} ran. With LayerDrop it is not known whose they are: "
                f"{remedy(self.settings)}, or name modules with target_layers."
            )
        return full

    def check_similarity_batch(self, similarity_batch: str) -> None:
        """Raise ValueError for a similarity over several batches, of which each skips other layers."""
        if self.settings and similarity_batch != "local":
            raise ValueError(
                f"similarity_batch={similarity_batch!r} compares a layer over several batches, and LayerDrop skips "
                f"other layers in each of them ({in_words(self.settings)}): {remedy(self.settings)}, or use "
                "similarity_batch='local'."
            )
