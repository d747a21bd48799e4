"""The mapping of guide layers to target layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Pair = tuple[str, str]  # (target layer, guide layer)

PAIR_SEPARATOR, WEIGHT_SEPARATOR = "~", "@"
NAMED_MAPPINGS = ("even", "reversed")
LAST = re.compile(r"last_([1-9]\d*)")


def check_mapping(kind: str) -> None:
    """Raise ValueError unless `kind` is `even`, `reversed` or `last_<k>`."""
    if kind not in NAMED_MAPPINGS and not LAST.fullmatch(kind):
        raise ValueError(
            f"Unknown layer_mapping {kind!r}; possible are 'even', 'reversed' and 'last_<k>' (such as 'last_4'), "
            "or name the pairs with layer_pairs."
        )


def parse_pair(text: str) -> Pair:
    """Split `"<target layer>~<guide layer>"`, with or without a weight, into a pair.

    Raises:
        ValueError: If the text has another form, or as `pair_weight` does.
    """
    names, _ = _names_and_weight(text)
    target, separator, guide = names.partition(PAIR_SEPARATOR)
    if not (separator and target.strip() and guide.strip()) or PAIR_SEPARATOR in guide:
        raise ValueError(
            f"layer pair {text!r} is not of the form '<target layer>~<guide layer>', such as 'hidden_states.1~layer1'."
        )
    return target.strip(), guide.strip()


def pair_weight(text: str) -> float:
    """Return the weight of a pair: the number after `@`, such as 0.5 of `"h.3~h.1@0.5"`, else 1.

    Raises:
        ValueError: If it is not a finite number of at least 0.
    """
    return _names_and_weight(text)[1]


def _names_and_weight(text: str) -> tuple[str, float]:
    names, separator, number = text.partition(WEIGHT_SEPARATOR)
    if not separator:
        return names, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(
            f"layer pair {text!r} has the weight {number.strip()!r}; write a finite number ≥ 0 after '@', such as "
            "'hidden_states.1~layer1@0.5', or leave '@' out for a weight of 1."
        )
    return names, weight


def pair_name(pair: Pair) -> str:
    """Return the pair as logs and cards write it, without its weight."""
    return PAIR_SEPARATOR.join(pair)


def pair_layers(target_layers: Sequence[str], guide_layers: Sequence[str], kind: str = "even") -> list[Pair]:
    """Pair every guide layer with a target layer. No guide layer is dropped, except by `last_<k>`.

    Args:
        target_layers: Names of the target's layers, from input to output.
        guide_layers: Names of the guide's layers, from input to output.
        kind: `even`, `reversed` or `last_<k>`. `even` is the paper's mapping, which spreads the guide's layers over the
            target's. Layer i of n_G goes to target layer `⌊i (n_T − 1) / (n_G − 1) + ½⌋`. A single guide layer goes to
            the last one. `reversed` pairs the guide's layers in the opposite order, as a negative control. `last_<k>`
            pairs the last k layers of both networks.

    Returns:
        (target layer, guide layer) pairs in the guide's order.

    Raises:
        ValueError: If the kind is unknown, one side has no layers, or k exceeds the number of layers of a network.

    Source: Subramaniam et al. 2025, released code.
    """
    check_mapping(kind)
    n_target, n_guide = len(target_layers), len(guide_layers)
    if not n_target or not n_guide:
        raise ValueError(f"Cannot pair {n_target} target layers with {n_guide} guide layers: each side needs one.")
    if last := LAST.fullmatch(kind):
        k = int(last[1])
        if k > min(n_target, n_guide):
            raise ValueError(f"layer_mapping {kind!r}: the target has {n_target} layers and the guide {n_guide}.")
        return list(zip(target_layers[-k:], guide_layers[-k:], strict=True))
    if n_guide == 1:
        return [(target_layers[-1], guide_layers[0])]
    steps = n_guide - 1
    even = [target_layers[(2 * i * (n_target - 1) + steps) // (2 * steps)] for i in range(n_guide)]
    return list(zip(even[::-1] if kind == "reversed" else even, guide_layers, strict=True))
