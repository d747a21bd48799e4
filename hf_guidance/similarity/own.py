"""Measures of the user's own: a function of two feature matrices, with its gradient by autograd."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_guidance.similarity.layers import Layer

EXPECTED = "expected a function of two tensors (samples, features) that returns their similarity, a scalar tensor"
OWN_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Tell whether a measure's name has the form `module:function`."""
    return bool(OWN_NAME.fullmatch(name))


def find_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Import the function that `module:function` names.

    Raises:
        ValueError: If there is no such module, no such function in it, or the function does not take two arguments.
    """
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"measure {name!r} cannot be imported ({error}): name a module on the Python path and a function in it, or "
            "call register_measure."
        ) from error
    if not callable(function):
        raise ValueError(f"measure {name!r} is {type(function).__name__}; expected a function of two feature matrices.")
    if not _takes_two(function):
        raise ValueError(f"measure {name!r} does not take two arguments; {EXPECTED}.")
    return function


def _takes_two(function: Callable[..., Any]) -> bool:
    """Tell whether a function takes two positional arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # of a builtin without a signature
        return True
    return True


@dataclass(frozen=True)
class Own:
    """A measure of the user's own.

    Args:
        name: Name for messages.
        function: (target features, guide features) → scalar.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]

    def prepare(self, layer: Layer, with_slope: bool) -> tuple[Layer, bool]:
        """Return the arguments as they are: the function is called once per pair."""
        return layer, with_slope

    def compare(self, target: tuple[Layer, bool], guide: tuple[Layer, bool]) -> tuple[Tensor, Tensor | None]:
        """Compute the similarity of a pair, and its slope in the target's features, if that is needed.

        Of layers of batch rows the function gets one row at a time.

        Raises:
            ValueError: If the function raises an error, returns no scalar, a value that is not finite for finite
                features, or one without a gradient in the target's features.
        """
        (layer, with_slope), (other, _) = target, guide
        if layer.values.ndim > 2:
            ours = [(replace(layer, values=row), with_slope) for row in layer.values]
            theirs = [(replace(other, values=row), False) for row in other.values]
            found = [self.compare(*sides) for sides in zip(ours, theirs, strict=True)]
            slopes = [slope for _, slope in found if slope is not None]
            return torch.stack([value for value, _ in found]), torch.stack(slopes) if slopes else None
        with torch.set_grad_enabled(with_slope):
            features = layer.values.clone().requires_grad_(with_slope)
            value = self._value(features, other.values.clone())  # it may change its arguments
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"measure {self.name!r} returned {got}; expected a scalar tensor.")
        if not value.isfinite() and _are_finite(layer, other):
            raise ValueError(
                f"measure {self.name!r} returned {value.item()} for finite features of shapes {tuple(features.shape)} "
                f"and {tuple(other.values.shape)}: it must be finite for any, those of a dead layer (zeros) included."
            )
        if not with_slope:
            return value, None
        slope = torch.autograd.grad(value, features, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            raise ValueError(
                f"measure {self.name!r} has no gradient in the target's features (its first argument): compute it with "
                "differentiable operations of torch, without detach or numpy."
            )
        if value.isfinite() and not slope.isfinite().all():
            raise ValueError(
                f"measure {self.name!r} has a gradient that is not finite, though its value {value.item():.3g} is: "
                "look for a root or a norm at 0, and add a small number inside."
            )
        return value.detach(), layer.tangent(slope.clone(memory_format=torch.contiguous_format))

    def _value(self, target: Tensor, guide: Tensor) -> Any:
        try:
            return self.function(target, guide)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the function is the user's
            raise ValueError(
                f"measure {self.name!r} does not run on features of shapes {tuple(target.shape)} and "
                f"{tuple(guide.shape)}: {type(error).__name__}: {error}. It is {EXPECTED.removeprefix('expected ')}."
            ) from error


def _are_finite(*layers: Layer) -> bool:
    return all(bool(layer.values.isfinite().all()) for layer in layers)
