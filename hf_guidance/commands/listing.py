"""`hf-guidance layers`: what of a network can be compared, with shapes and the names that select it."""

from __future__ import annotations

import argparse
import re
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_guidance.commands.networks import example_for, load
from hf_guidance.config import HIDDEN_STATES, GuidanceConfig
from hf_guidance.features.hidden_states import first_tensor
from hf_guidance.features.modules import find_modules
from hf_guidance.features.reader import LayerReader, base_model_of
from hf_guidance.guide.forward import forward
from hf_guidance.mapping import pair_layers


class Group(NamedTuple):
    """Modules of one type at places that differ in numbers only.

    Attributes:
        names: Their names, in order.
        kind: Their type.
        shapes: Shapes of the outputs of the first and the last for the example; none if they gave no tensor of floats.
        states: Numbers of the hidden states that they make, in order.
        glob: What selects just them in `target_layers`, `guide_layers` or `layers_a`; empty if nothing short does.
    """

    names: list[str]
    kind: str
    shapes: list[tuple[int, ...]]
    states: list[int]
    glob: str


def add_command(commands: Any) -> None:
    """Add the command and its flags to a parser."""
    parser = commands.add_parser("layers", help="what of a network can be compared, with shapes")
    parser.add_argument("model", help="Hub id, folder, or timm/<architecture>")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="random weights, drawn with this seed")
    parser.add_argument("--image_size", type=int, help="size of the example's images, in pixels")
    parser.add_argument("--pairs", metavar="OTHER", help="guide of this network: print the pairs that a mapping makes")
    parser.add_argument("--other_untrained", type=int, metavar="SEED", help="random weights for the guide")
    parser.add_argument("--layers", nargs="+", help="layers of MODEL, for --pairs")
    parser.add_argument("--other_layers", nargs="+", help="layers of OTHER, for --pairs")
    parser.add_argument("--layer_mapping", help="mapping, for --pairs")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Print the layers of a network, or the pairs of two."""
    network = load(given.model, given.untrained)
    example = example_for(network, given.model, given.image_size)
    own = ("--layers", given.layers), ("--other_layers", given.other_layers), ("--layer_mapping", given.layer_mapping)
    if given.pairs is None and (alone := [flag for flag, value in own if value is not None]):
        raise ValueError(f"{alone[0]} says what to pair: name the other network with --pairs.")
    if given.pairs is None:
        print(described(given.model, example, *layers_of(network, example)))
        return
    other = load(given.pairs, given.other_untrained)
    inputs = example_for(other, given.pairs, given.image_size)
    ours = names_of(network, example, given.layers or [HIDDEN_STATES], "target")
    theirs = names_of(other, inputs, given.other_layers or [HIDDEN_STATES], "guide")
    mapping = given.layer_mapping or GuidanceConfig().layer_mapping
    print(f"{mapping}: {len(ours)} layers of {given.model}, {len(theirs)} of {given.pairs}")
    for target, guide in pair_layers(ours, theirs, mapping):
        print(f"  {target}~{guide}")


@torch.no_grad()
def names_of(network: nn.Module, example: dict[str, Tensor], layers: list[str], role: str) -> list[str]:
    """Return the names of the layers that are read of a network, in order."""
    reader = LayerReader(network, layers, role)
    with reader.reading(lambda name, output: None):
        forward(network, example, role)
    reader.remove()
    return reader.names()


@torch.no_grad()
def layers_of(network: nn.Module, example: dict[str, Tensor]) -> tuple[list[Group], dict[str, tuple[int, ...]]]:
    """Run a network on an example, and return its modules in groups and its hidden states.

    Args:
        network: The network.
        example: Columns of a batch that it takes.

    Returns:
        The groups, shallowest first, and hidden state → shape, without the embeddings; none if it returns none.
    """
    base = base_model_of(network)
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, int] = {}  # where each module's last output lies in memory

    kept: list[Tensor] = []  # so that no other tensor takes the place of one
    rows = len(next(iter(example.values())))

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim > 1 and len(tensor) == rows:
            shapes[name], places[name] = tuple(tensor.shape), tensor.data_ptr()
            kept.append(tensor)

    body = getattr(base, "base_model_prefix", "")  # the network without its head is no layer
    modules = {name: module for name, module in base.named_modules() if name and name != body}
    states: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        reader = LayerReader(network, ["hidden_states"], "target")
    except ValueError:  # it returns none
        forward(network, example, "network")
    else:
        with reader.reading(lambda _, output: output) as read:
            forward(network, example, "network")
        states = dict(read)
        reader.remove()
    finally:
        for hook in hooks:
            hook.remove()
    of_place = {tensor.data_ptr(): int(name.rpartition(".")[2]) for name, tensor in states.items()}
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in base.named_modules():
        if name in modules and not isinstance(module, nn.ModuleList):
            groups.setdefault((re.sub(r"\d+", "#", name), type(module).__name__), []).append(name)
    ordered = sorted(groups.items(), key=lambda group: group[0][0].count("."))
    makes: dict[int, tuple[str, str]] = {}  # of modules that share a place, the shallowest, and of these the last
    for key, own in ordered:
        for state in [of_place[places[name]] for name in own if places.get(name) in of_place]:
            if makes.get(state, key)[0].count(".") >= key[0].count("."):
                makes[state] = key
    found = []
    for key, own in ordered:
        seen = [shapes[name] for name in own if name in shapes]
        made = sorted(state for state, maker in makes.items() if maker == key)
        found.append(Group(own, key[1], [*seen[:1], *seen[-1:]], made, _selecting(base, own, key[1])))
    return found, {name: tuple(tensor.shape) for name, tensor in states.items()}


def _selecting(base: nn.Module, own: list[str], kind: str) -> str:
    """Return what selects just these modules: a name, a glob such as `h.*`, or their type; empty if neither does."""
    levels = list(zip(*(name.split(".") for name in own), strict=True))
    numbers = ".".join(level[0] if len(set(level)) == 1 else re.sub(r"\d+", "*", level[0]) for level in levels)
    for words in (numbers, kind):
        with suppress(ValueError):  # wildcards alone
            if list(find_modules(base, words)) == own:
                return words
    return ""


def described(model: str, example: dict[str, Tensor], groups: list[Group], states: dict[str, tuple[int, ...]]) -> str:
    """Write groups and hidden states as a table for the terminal."""
    given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in example.items())
    lines = [f"{model}, for {given}", ""]
    if states:
        first, last = next(iter(states)), next(reversed(states))
        shapes = _shapes([states[first], states[last]])
        lines.append(f"{len(states)} hidden states ({first} … {last})  {shapes}  select: hidden_states")
    else:
        lines.append("no hidden states: name the layers by a glob or a type")
    rows = [
        (
            f"{len(g.names)} {g.kind} ({g.names[0]} … {g.names[-1]})"
            if len(g.names) > 1
            else f"{g.kind} ({g.names[0]})",
            _shapes(g.shapes),
            g.glob,
            _states(g.states),
        )
        for g in groups
        if g.shapes
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    lines += ["", *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)]
    return "\n".join(lines)


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    """Write the shapes of outputs, whose first axis is the batch, each once."""
    return " … ".join(dict.fromkeys(f"(batch, {', '.join(map(str, shape[1:]))})" for shape in shapes))


def _states(numbers: list[int]) -> str:
    """Write which hidden states modules make."""
    if len(numbers) < 2:
        return f"hidden_states.{numbers[0]}" if numbers else ""
    return f"hidden_states.{numbers[0]} … {numbers[-1]}"
