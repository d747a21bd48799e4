"""Which guide layer goes with which target layer."""

import itertools
import math

import pytest

from hf_guidance.mapping import check_mapping, pair_layers, pair_name, pair_weight, parse_pair


def layers(side: str, n: int) -> list[str]:
    return [f"{side}{i}" for i in range(n)]


def pairs(n_target: int, n_guide: int, kind: str = "even") -> list[tuple[int, int]]:
    """The same as numbers."""
    return [(int(t[1:]), int(g[1:])) for t, g in pair_layers(layers("t", n_target), layers("g", n_guide), kind)]


@pytest.mark.parametrize("n_target", range(1, 12))
@pytest.mark.parametrize("n_guide", range(2, 12))
def test_even_is_the_papers_formula_for_every_guide_layer(n_target: int, n_guide: int) -> None:
    formula = [math.floor(i * (n_target - 1) / (n_guide - 1) + 0.5) for i in range(n_guide)]
    assert pairs(n_target, n_guide) == list(zip(formula, range(n_guide), strict=True))


def test_even_by_example() -> None:
    assert pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert pairs(5, 3) == [(0, 0), (2, 1), (4, 2)]
    assert pairs(2, 4) == [(0, 0), (0, 1), (1, 2), (1, 3)]  # a deeper guide keeps all its pairs
    assert pairs(4, 3) == [(0, 0), (2, 1), (3, 2)]  # 1.5 rounds up


def test_even_over_the_papers_networks() -> None:
    target = [t for t, _ in pairs(50, 20)]  # the Deep FCN's blocks and the convs of a ResNet-18
    assert (target[0], target[-1], len(set(target))) == (0, 49, 20)
    assert {b - a for a, b in itertools.pairwise(target)} == {2, 3}


@pytest.mark.parametrize("kind", ["even", "reversed"])
def test_a_single_guide_layer_goes_to_the_last_target_layer(kind: str) -> None:
    assert pairs(6, 1, kind) == [(5, 0)]


@pytest.mark.parametrize("kind", ["even", "reversed", "last_1"])
def test_a_single_target_layer_takes_every_guide_layer_there_is(kind: str) -> None:
    assert pairs(1, 3, kind) == ([(0, 2)] if kind == "last_1" else [(0, 0), (0, 1), (0, 2)])


def test_reversed_turns_the_guide_upside_down() -> None:
    assert pairs(3, 3, "reversed") == [(2, 0), (1, 1), (0, 2)]
    assert pairs(2, 4, "reversed") == [(1, 0), (1, 1), (0, 2), (0, 3)]


def test_last_k_pairs_the_last_k_of_both_in_order() -> None:
    assert pairs(6, 3, "last_2") == [(4, 1), (5, 2)]
    assert pairs(3, 12, "last_3") == [(0, 9), (1, 10), (2, 11)]


def test_a_pair_survives_being_written_and_read() -> None:
    pair = ("hidden_states.1", "layer1.0.conv1")
    assert pair_name(pair) == "hidden_states.1~layer1.0.conv1"
    assert parse_pair(pair_name(pair)) == pair
    assert parse_pair(" hidden_states.1 ~ layer1 ") == ("hidden_states.1", "layer1")


@pytest.mark.parametrize("text", ["", "hidden_states.1", "~layer1", "hidden_states.1~", " ~ ", "a~b~c"])
def test_what_is_no_pair_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=rf"layer pair '{text}' is not of the form '<target layer>~<guide layer>'"):
        parse_pair(text)


@pytest.mark.parametrize(
    ("text", "weight"), [("h.3~h.1@0.5", 0.5), (" h.3 ~ h.1 @ 2 ", 2.0), ("h.3~h.1@0", 0.0), ("h.3~h.1", 1.0)]
)
def test_a_pair_has_the_weight_after_its_at_sign_or_one(text: str, weight: float) -> None:
    assert parse_pair(text) == ("h.3", "h.1")
    assert pair_weight(text) == weight
    assert pair_name(parse_pair(text)) == "h.3~h.1"


@pytest.mark.parametrize("weight", ["-0.5", "", "half", "nan", "inf", "1@2", "0.5~h.2"])
def test_a_weight_that_is_none_is_an_error_that_names_the_pair(weight: str) -> None:
    words = rf"layer pair 'h\.3~h\.1@{weight}' has the weight '{weight}'; write a finite number ≥ 0 after '@', such as"
    for read in (pair_weight, parse_pair):
        with pytest.raises(ValueError, match=words):
            read(f"h.3~h.1@{weight}")


@pytest.mark.parametrize("kind", ["", "Even", "last", "last_0", "last_-1", "last_2.5", "last_k", "random"])
def test_unknown_mapping_is_an_error_that_lists_the_known_ones(kind: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown layer_mapping '{kind}'; possible are 'even', 'reversed' and 'last_"):
        check_mapping(kind)
    with pytest.raises(ValueError, match="Unknown layer_mapping"):
        pair_layers(["t"], ["g"], kind)


@pytest.mark.parametrize(("n_target", "n_guide"), [(0, 3), (3, 0), (0, 0)])
def test_a_side_without_layers_is_an_error(n_target: int, n_guide: int) -> None:
    with pytest.raises(ValueError, match=f"Cannot pair {n_target} target layers with {n_guide} guide layers"):
        pairs(n_target, n_guide)


def test_more_last_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="layer_mapping 'last_4': the target has 3 layers and the guide 12"):
        pairs(3, 12, "last_4")
