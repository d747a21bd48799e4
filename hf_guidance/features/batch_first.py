"""Modules with the batch on their first axis, told from sequence-first ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_guidance.features.distributed import runs_alone

logger = logging.getLogger(__name__)


class BatchFirst:
    """Record of which modules have the batch on their first axis.

    An output with as many positions as rows leaves it open. One more run on a single row then settles it.

    Args:
        model: Network that is called.
        modules: Its modules to read, by name.
        role: `target` or `guide`, for messages.

    Attributes:
        open: Modules that have not been told apart yet.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], role: str) -> None:
        self.model, self.modules, self.role = model, modules, role
        self.open = set(modules)
        self._unclear: set[str] = set()
        self._called: tuple[Any, ...] | None = None

    def note_call(self, *called: Any) -> None:
        """Keep the arguments and named arguments of a call, until the forward has shown whether they are needed."""
        self._called = called

    def note(self, name: str, features: Tensor) -> None:
        """Note what the shape of a module's output says."""
        if name not in self.open:
            return
        if features.ndim < 3 or features.shape[0] != features.shape[1]:
            self.open.discard(name)  # samples have the batch on their first axis, or raise
            self._unclear.discard(name)
        else:
            self._unclear.add(name)

    def forget_call(self) -> None:
        """Keep nothing of a forward that left no module open."""
        self._called = self._called if self._unclear else None

    def settle(self, reading: Callable[[], AbstractContextManager[dict[str, Any]]]) -> None:
        """Settle what a square output left open.

        The network runs on the first row of what it was called with, in evaluation mode and without gradients. Of
        several processes each decides by its own batch. A sharded network cannot run on one of them alone: there a
        warning says that the batch is taken to be on the first axis.

        Args:
            reading: Makes a context that yields the shapes of the modules' outputs by name.

        Raises:
            ValueError: If a module is sequence-first.
        """
        called, self._called = self._called, None
        if not self._unclear or called is None:
            return
        unclear, self._unclear = self._unclear, set()
        if not runs_alone(self.model):
            self.open -= unclear
            self._say_unsettled("is sharded", unclear)
            return
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), reading() as shapes:
                self.model(*_first_row(called[0]), **_first_row(called[1]))
        except Exception as error:  # of a network that takes no single row
            self._say_unsettled(f"does not run on one row ({error})", unclear)
            shapes = {}
        finally:
            for module, mode in modes:
                module.training = mode
        for name in unclear:
            if shapes.get(name, (1,))[0] != 1:
                raise ValueError(
                    f"{self.role} layer {name!r} ({type(self.modules[name]).__name__}) is sequence-first: of one row "
                    f"it gave shape {shapes[name]}, where the batch is expected on the first axis. Build it with "
                    "batch_first=True, or name another layer."
                )
        self.open -= unclear
        self._unclear, self._called = set(), None  # of this run on one row

    def _say_unsettled(self, why: str, unclear: Collection[str]) -> None:
        logger.warning(
            "The %s %s, so that it cannot be told whether the batch is on the first axis of %s: this is taken for "
            "granted.",
            self.role,
            why,
            ", ".join(sorted(unclear)),
        )


def _first_row(arguments: Any) -> Any:
    """Return the first row of every tensor in the arguments of a forward."""
    if isinstance(arguments, Tensor):
        return arguments[:1] if arguments.ndim else arguments
    if isinstance(arguments, Mapping):
        return {name: _first_row(value) for name, value in arguments.items()}
    if type(arguments) in (tuple, list):
        return type(arguments)(map(_first_row, arguments))
    return arguments
