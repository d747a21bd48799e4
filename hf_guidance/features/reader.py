"""Reader of a network's features during one forward: hidden states, or the outputs of named modules."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.features.batch_first import BatchFirst
from hf_guidance.features.hidden_states import Blocks, first_tensor, last_tensor
from hf_guidance.features.layer_drop import LayerDrop
from hf_guidance.features.modules import describe_modules, find_modules

HIDDEN = re.compile(r"((?:encoder_|decoder_)?hidden_states)(?:\.(\d+))?")
Reduce = Callable[[str, Any], Any]


class AllRead(Exception):
    """Signal, raised inside a forward, that all needed layers have been read."""


class LayerReader:
    """Reader of chosen layers of one network while it runs. It reduces each output at once and keeps nothing else.

    It hooks the network itself, so that Trainer, DDP or your own loop calls the network as usual. Outside `reading` the
    hooks do nothing, in evaluation as well as when activation checkpointing repeats a block. `reading` sees the
    forwards of its own thread, so that several threads may share a network, each with a reader of its own. If LayerDrop
    skips layers, only those that ran are read. Each keeps its name.

    Args:
        model: Any `nn.Module`. PEFT models are read by the module names of their base model.
        layers: `hidden_states` (those that are layers, without the embeddings; of an encoder-decoder, the decoder's),
            `hidden_states.<i>`, `encoder_hidden_states`, or modules by exact name, glob or type. In a glob, `*` stays
            within one level and `**` does not.
        role: `target` or `guide`, for messages.

    Raises:
        ValueError: If the network lacks a layer or returns no hidden states, or LayerDrop hides which layer a hidden
            state belongs to.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], role: str) -> None:
        self.model, self.role = model, role
        self.keep: set[str] | None = None  # layers in a pair, once the pairs are known
        self.queries: set[str] = set()  # hidden states of a decoder's queries, as of DETR
        self.stop_early = False  # end a forward with `AllRead` once these are read
        self._hidden: list[tuple[str, int | None]] = []
        self._reduce: Reduce | None = None
        self._read: dict[str, Any] = {}
        self._seen: list[str] = []
        self._counted: dict[str, None] = {}  # hidden states of a forward, skipped ones included
        self._order: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self._full_names: dict[str, str] = {}  # by the name given, of single modules
        base = base_model_of(model)
        for layer in layers:
            if match := HIDDEN.fullmatch(layer):
                self._hidden.append((match[1], int(match[2]) if match[2] else None))
            else:
                found = find_modules(base, layer, role)
                self.modules |= found
                if len(found) == 1:
                    self._full_names[layer] = next(iter(found))
        self.layer_drop = LayerDrop(model, base, [kind for kind, _ in self._hidden], self.modules)
        self._blocks = Blocks(base)
        self._layers_among: dict[str, list[int]] = {}  # indices by kind of hidden states, once a forward has shown them
        self._needs_gradients, self._ignoring, self._is_method, self._of_backbone = False, False, False, None
        self._finds_layers, self._finds_batch_axis = False, False  # in this forward
        self._thread: int | None = None  # the one that reads
        if self._hidden:
            self._check_returns_hidden_states()
        self._batch_first = BatchFirst(model, self.modules, role)
        self._order = list(self.modules)
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks on the network, unless they are there. `reading` does so by itself."""
        if self._handles:
            return
        self.layer_drop.attach()
        self._handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if self._hidden:
            base = base_model_of(self.model)
            backbone = getattr(base, "base_model", base)
            if isinstance(backbone, nn.Module) and backbone is not base:
                self._handles.append(backbone.register_forward_pre_hook(self._ask_backbone, with_kwargs=True))
                self._handles.append(backbone.register_forward_hook(self._keep_backbone))
            self._handles.append(self.model.register_forward_hook(self._read_hidden_states))
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(partial(self._read_module, name)))

    @contextmanager
    def reading(self, reduce: Reduce) -> Iterator[dict[str, Any]]:
        """Read the layers of each forward inside this context.

        Args:
            reduce: Called with the name and output of each layer. For a target with gradients it is wrapped by
                `not_recomputed`.

        Yields:
            Layer → result of `reduce`, filled in during the forward.

        Raises:
            RuntimeError: If this reader is reading already, as in another thread.
        """
        if self._reduce is not None:
            raise RuntimeError(
                f"the layers of the {self.role} are being read already, here or in another thread: give each thread a "
                "GuidanceLoss of its own (they may share a guide), and end one `watch` before the next."
            )
        self.attach()
        self._thread = threading.get_ident()
        self._needs_gradients, self._ignoring = self.role == "target" and torch.is_grad_enabled(), False
        self._reduce, self._read, self._counted = not_recomputed(reduce) if self._needs_gradients else reduce, {}, {}
        if self.layer_drop.has_rate:
            self.layer_drop.start()
        self._finds_layers = bool(self._hidden) and not self._layers_among
        self._finds_batch_axis = bool(self._batch_first.open)
        if self._finds_layers:
            self._blocks.attach()
        try:
            with _without_fast_attention():
                yield self._read
        finally:
            if self._finds_layers:
                self._blocks.remove()
            if self.layer_drop.has_rate:
                self.layer_drop.stop()
            self._seen = list(self._read)
            # keep nothing of a forward, so that the network can be copied and saved
            self._reduce, self._read, self._of_backbone, self._thread = None, {}, None, None
            if self._finds_batch_axis:
                self._batch_first.forget_call()

    def full_name(self, layer: str) -> str:
        """Return a layer's name in this network, which `layers` may give without the head's prefix."""
        return self._full_names.get(layer, layer)

    def names(self) -> list[str]:
        """Return the layers in order: named modules, and the hidden states of the last forward, skipped ones included.

        Raises:
            ValueError: If a named module did not run, or a hidden state was not returned.
        """
        self.check_skipped([name for name in self._order if name not in self._seen])
        return [*self._counted, *self._order]

    def has_run(self) -> bool:
        """Tell whether the last forward reached a layer to read, or skipped it by LayerDrop."""
        return bool(self._seen) or self.layer_drop.has_run()

    def check_skipped(self, missing: Sequence[str]) -> None:
        """Raise ValueError if the last forward left out these layers for a reason other than LayerDrop."""
        missing = [name for name in missing if not self._skipped(name)]
        if missing:
            raise ValueError(f"{self.role} layers {missing} did not run in the {self.role}'s forward: leave them out.")

    def _skipped(self, name: str) -> bool:
        return bool(self.layer_drop.settings) and self.layer_drop.has_skipped(name)

    def remove(self) -> None:
        """Remove the hooks from the network."""
        self.layer_drop.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _passes_by(self) -> bool:
        """Tell whether a forward is none to read."""
        return self._reduce is None or self._thread != threading.get_ident()

    # ------------------------------------------------------------------------------------------------------- hooks

    def _store(self, name: str, output: Any) -> None:
        if self._passes_by() or self._ignoring or (self.keep is not None and name not in self.keep):
            return
        assert self._reduce is not None
        if name in self._read:
            raise ValueError(
                f"{self.role} layer {name!r} ran more than once in one forward, so it has several outputs. Name "
                "another layer, or use hidden_states. A `compute_loss` that runs the target twice cannot be guided."
            )
        features = output if isinstance(output, Tensor) else first_tensor(output)
        if isinstance(features, Tensor) and name in self._batch_first.open:
            self._batch_first.note(name, features)
        self._read[name] = self._reduce(name, features)
        if self.stop_early and self.keep == self._read.keys():
            raise AllRead

    def settle_batch_first(self) -> None:
        """Tell modules with the batch on their first axis from sequence-first ones, if a square output left it open.

        Raises:
            ValueError: If a module is sequence-first.
        """
        if not self._batch_first.open:
            return
        kept = self._seen, self._counted
        try:
            self._batch_first.settle(self._reading_shapes)
        finally:
            self._seen, self._counted = kept

    @contextmanager
    def _reading_shapes(self) -> Iterator[dict[str, Any]]:
        with suppress(AllRead), self.reading(lambda _, features: tuple(features.shape)) as shapes:
            yield shapes

    def _read_module(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._store(name, output)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Ask for hidden states, unless this is one more forward without gradients, of a reference or for metrics."""
        if self._passes_by():
            return None
        self._ignoring = self._needs_gradients and not torch.is_grad_enabled()
        if self._finds_batch_axis and not self._ignoring:
            self._batch_first.note_call(args, kwargs)
        if self._ignoring or not self._hidden:
            return None
        if self._finds_layers:
            self._blocks.forget()
        # a method of a Trainer that is called in the forward's place, as TRL does for a fused head
        self._is_method = bool(args) and isinstance(args[0], nn.Module)
        return None if self._is_method else (args, {**kwargs, "output_hidden_states": True})

    def _ask_backbone(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        asks = self._is_method and not (self._passes_by() or self._ignoring)
        return (args, {**kwargs, "output_hidden_states": True}) if asks else None

    def _keep_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._passes_by():
            self._of_backbone = None if self._ignoring else output

    def _read_hidden_states(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._passes_by():
            return
        backbone, self._of_backbone = self._of_backbone, None
        if self._ignoring:
            return
        stored: set[str] = set()
        for kind, index in self._hidden:
            states = states_of(output, kind)
            are_queries = kind == "hidden_states" and self._are_queries(output)
            if states is None and (self._is_method or not isinstance(output, tuple)):
                states = states_of(backbone, kind)  # a fused head drops them
            if states is not None and self.layer_drop.settings:
                states = self.layer_drop.in_full(kind, states)
            if not states:
                hint = ", as a tuple has no names: set config.return_dict=True" if isinstance(output, tuple) else ""
                raise ValueError(
                    f"the {self.role} ({type(module).__name__}) returned no {kind}{hint}. If it has layers at all, "
                    f"name them with {self.role}_layers."
                )
            counted = [i for i, state in enumerate(states) if state is not None or self._skipped(f"{kind}.{i}")]
            if index is not None and index not in counted:  # some models return only the selected ones
                raise ValueError(
                    f"{self.role} layer '{kind}.{index}' not found; the {self.role} returned {kind}.0 … "
                    f"{kind}.{len(states) - 1}."
                )
            if kind not in self._layers_among:
                self._layers_among[kind] = self._blocks.layers_among(states)
            among = self._layers_among[kind]
            for i in [i for i in counted if i in among] if index is None else [index]:
                if f"{kind}.{i}" in stored:
                    continue  # named twice
                stored.add(f"{kind}.{i}")
                self._counted[f"{kind}.{i}"] = None
                if are_queries:
                    self.queries.add(f"{kind}.{i}")
                if (state := states[i]) is not None:
                    self._store(f"{kind}.{i}", state if isinstance(state, Tensor) else last_tensor(state))

    def _are_queries(self, output: Any) -> bool:
        """Tell whether hidden states are those of a decoder that reads no text."""
        has_own = states_of(output, "decoder_hidden_states") is not None and not getattr(output, "hidden_states", None)
        return has_own and not getattr(getattr(base_model_of(self.model), "config", None), "is_encoder_decoder", False)

    def _check_returns_hidden_states(self) -> None:
        from transformers import PreTrainedModel

        base = base_model_of(self.model)
        known = inspect.signature((base if isinstance(base, PreTrainedModel) else self.model).forward).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
        if "output_hidden_states" not in known and not (takes_any and isinstance(base, PreTrainedModel)):
            raise ValueError(
                f"the {self.role} ({type(self.model).__name__}) takes no output_hidden_states; name its layers with "
                f"{self.role}_layers, by module name, glob or type. It has {describe_modules(self.model)}."
            )


_lock, _readers, _was_fast = threading.Lock(), 0, True


@contextmanager
def _without_fast_attention() -> Iterator[None]:
    """Keep torch's own attention from nested tensors, which have no length. The setting is that of all threads."""
    global _readers, _was_fast
    with _lock:
        if not _readers:
            _was_fast = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                torch.backends.mha.set_fastpath_enabled(_was_fast)


def states_of(output: Any, kind: str) -> Sequence[Any] | None:
    """Return the hidden states of a kind in a network's output; None if it has none.

    Args:
        output: Output of a network.
        kind: `hidden_states`, which in an encoder-decoder are those of the decoder, or the name of others.
    """
    kinds = ("hidden_states", "decoder_hidden_states") if kind == "hidden_states" else (kind,)
    found = (output.get(k) if isinstance(output, dict) else getattr(output, k, None) for k in kinds)
    return next((states for states in found if states is not None), None)


def not_recomputed(reduce: Reduce) -> Reduce:
    """Hide `reduce` from activation checkpointing, whose second forward would not find the tensors saved in it.

    Reentrant checkpointing is refused. Its first forward has no gradients, so a layer inside would not be guided.
    """
    with_gradients = torch.is_grad_enabled()

    def reduce_unseen(name: str, features: Any) -> Any:
        if with_gradients and not torch.is_grad_enabled():
            raise ValueError(
                f"target layer {name!r} ran without gradients inside the target's forward, as under reentrant "
                "activation checkpointing: guidance could not reach it. Set use_reentrant=False, or name layers "
                "outside (hidden_states)."
            )
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            return reduce(name, features)

    return reduce_unseen


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the network inside a PEFT model; any other network itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()
