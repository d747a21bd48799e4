"""Which hidden states are layers: told by the blocks that ran, not by the kind of network."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Output: TypeAlias = "Tensor | PackedSequence | Mapping[str, Output] | Sequence[Output] | None"  # of a module
# by their names where no block can be watched, as inside torch.compile
STARTS_WITH_A_LAYER = re.compile("Mamba|Rwkv|MobileNet|MobileViT|PoolFormer|Pvt|Cvt|Segformer|GLPN|PatchTSMixer")
ENDS_TWICE = re.compile("Mamba|Rwkv")
Ran: TypeAlias = "list[tuple[Callable[[], Any], Callable[[], Any]]]"  # what a block took and gave, in order


class Blocks:
    """Record of what the blocks of a network take and give in one forward: the members of its module lists.

    In a network without module lists these are the members of each `nn.Sequential` of like modules.

    Most networks return their embeddings as the first hidden state, some a layer's output. Some return the last layer
    twice, as it is and normed. A hidden state that is what a block took or gave tells which of these it is.

    Args:
        base: The network.
    """

    def __init__(self, base: nn.Module) -> None:
        modules = dict(base.named_modules())
        self._lists: dict[str, nn.ModuleList | nn.Sequential] = {
            name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)
        } or {
            name: module for name, module in modules.items() if isinstance(module, nn.Sequential) and _is_stack(module)
        }
        self._ran: dict[str, Ran] = {}
        self._is_timm, self._name = hasattr(base, "timm_model"), type(base).__name__
        self._handles: list[Any] = []
        self._thread: int | None = None

    def attach(self) -> None:
        """Put the hooks on the blocks. They note what runs in this thread, as others may share the network."""
        self.remove()
        self._thread = threading.get_ident()
        for name, blocks in self._lists.items():
            hook = partial(self._note, name)
            self._handles += [
                block.register_forward_hook(hook, with_kwargs=True) for block in blocks if block is not None
            ]

    def forget(self) -> None:
        """Forget what ran, as a forward to read begins."""
        self._ran = {}

    def remove(self) -> None:
        """Remove the hooks from the blocks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, name: str, block: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or self._thread != threading.get_ident():
            return
        taken = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        given = None if isinstance(output, PackedSequence) else first_tensor(output)
        # references keep no tensor alive that the network does not keep itself
        refs = (weakref.ref(value) if isinstance(value, Tensor) else _nothing for value in (taken, given))
        self._ran.setdefault(name, []).append((next(refs), next(refs)))

    def layers_among(self, states: Sequence[Output]) -> list[int]:
        """Return the indices of the hidden states that are layers, each once.

        Args:
            states: Hidden states of the forward that ran; None for a layer that was skipped.
        """
        tensors = [last_tensor(state) for state in states]
        inputs = self._inputs_of_stacks(tensors)
        found = range(self._first_layer(tensors), len(tensors) - self._ends_twice(tensors))
        return [i for i in found if tensors[i] is None or id(tensors[i]) not in inputs]

    def _inputs_of_stacks(self, states: Sequence[Tensor | None]) -> set[int]:
        """Return the ids of the states that a stack of blocks took, each of whose outputs is a state too."""
        stacks = self._stacks(states)
        inside = {id(given()) for ran in stacks for _, given in ran}
        return {id(ran[0][0]()) for ran in stacks} - inside

    def _stacks(self, states: Sequence[Tensor | None]) -> list[Ran]:
        """Return the stacks of blocks whose outputs are states, the last one maybe not until it is normed."""
        known = {id(state) for state in states if state is not None}
        given = {name: [id(output()) for _, output in ran] for name, ran in self._ran.items()}
        return [ran for name, ran in self._ran.items() if known.issuperset(given[name][:-1] or given[name])]

    def _first_layer(self, states: Sequence[Tensor | None]) -> int:
        if self._is_timm or not states:
            return 0  # timm's intermediates are all layers
        giving = [ran for ran in self._ran.values() if any(given() is states[0] for _, given in ran)]
        taking = [ran for ran in self._ran.values() if ran[0][0]() is states[0] and len(ran) > 1]
        if giving and not (taking and all(len(ran) == 1 for ran in giving)):  # else from a stem
            return 0
        for ran in self._ran.values():
            taken = [taken() for taken, _ in ran]
            repeated = next((i for i, state in enumerate(states) if state is not taken[0]), 0)
            if repeated:
                return repeated  # behind what the first block took, once or more
            if any(value is states[0] for value in taken):
                return 0  # a block ran before
        if not self._ran and STARTS_WITH_A_LAYER.search(self._name):
            return 0
        counts = {len(ran) for ran in self._ran.values()} or {len(blocks) for blocks in self._lists.values()}
        return 0 if len(states) in counts and len(states) - 1 not in counts else 1

    def _ends_twice(self, states: Sequence[Tensor | None]) -> bool:
        if any(state is None for state in states):
            return False  # LayerDrop skips layers of transformers that end once
        if not self._ran:
            return bool(ENDS_TWICE.search(self._name))
        before = {id(state) for state in states[:-1]}
        for ran in self._ran.values():
            given = [id(output()) for _, output in ran]
            if len(ran) >= max(2, len(states) - 2) and before.issuperset(given) and id(states[-1]) not in given:
                return True
        return False


def _nothing() -> None:
    return None


def _is_stack(sequence: nn.Sequential) -> bool:
    """Tell whether a sequence is of blocks of one kind, each made of modules."""
    kinds = {type(block) for block in sequence}
    return len(sequence) > 1 and len(kinds) == 1 and any(True for _ in sequence[0].children())


def first_tensor(output: Output) -> Any:
    """Return the features in a module's output: the tensor itself, or the first one in a tuple or model output.

    Raises:
        ValueError: If the output is a packed sequence.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, PackedSequence):
        raise ValueError("a packed sequence has no batch axis: choose a layer after the sequence is unpacked.")
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((first_tensor(entry) for entry in output if entry is not None), None)
    return output


def last_tensor(state: Output) -> Any:
    """Return a hidden state: the tensor itself, or the last one where a network gives those of a stage together."""
    return last_tensor(state[-1]) if isinstance(state, (tuple, list)) and state else state
