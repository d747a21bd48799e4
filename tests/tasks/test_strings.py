"""Random strings: the hash that splits them, uniform draws, columns of lists, and lengths that allow none."""

import numpy as np
import pytest

from hf_guidance.tasks.strings import draw_strings, ragged, string_hash

SHORT = {"min_length": 3, "max_length": 6, "num_symbols": 4, "seed": 0}


@pytest.mark.parametrize(("split", "tenths"), [("train", range(2, 10)), ("eval", [0]), ("test", [1])])
def test_the_hash_of_all_symbols_but_the_last_decides_the_split(split, tenths):
    symbols, lengths = draw_strings(split, 200, **SHORT)
    assert symbols.shape == (200, 6)
    assert set((string_hash(symbols, lengths - 1) % np.uint64(10)).tolist()) <= set(tenths)


def test_symbols_and_lengths_are_uniform():
    symbols, lengths = draw_strings("train", 20_000, **SHORT)
    assert set(lengths) == {3, 4, 5, 6}
    np.testing.assert_allclose(np.bincount(lengths)[3:] / len(lengths), 0.25, atol=0.015)
    last = symbols[np.arange(len(symbols)), lengths - 1]  # the only one that is free of the hash
    np.testing.assert_allclose(np.bincount(last) / len(last), 0.25, atol=0.015)


def test_the_seed_decides_and_a_split_draws_on_its_own():
    one, other = draw_strings("eval", 50, **SHORT), draw_strings("eval", 50, **{**SHORT, "seed": 1})
    assert np.array_equal(one[0], draw_strings("eval", 50, **SHORT)[0])
    assert not np.array_equal(one[0], other[0])


def test_a_column_of_lists_has_the_beginning_of_each_row():
    column = ragged(np.arange(6).reshape(2, 3), np.array([1, 3]))
    assert column.to_pylist() == [[0], [3, 4, 5]]


@pytest.mark.parametrize(
    ("change", "size", "words"),
    [
        ({}, 0, "test_size must be at least 1, got 0"),
        ({"min_length": 7}, 5, "lengths must be 1 <= min_length <= max_length, got 7 and 6"),
        ({"num_symbols": 1}, 5, "num_symbols must be at least 2, got 1"),
        ({"min_length": 1, "max_length": 1}, 5, "no string of 1 to 1 symbols out of 4 falls into the test split"),
    ],
)
def test_impossible_strings_say_why(change, size, words):
    with pytest.raises(ValueError, match=words):
        draw_strings("test", size, **{**SHORT, **change})


def test_the_hash_that_splits_is_the_same_everywhere_and_sees_no_padding():
    def plain(string):
        mask, power, total = 2**64 - 1, 1, 0
        for symbol in string:
            power = power * 0x9E3779B97F4A7C15 & mask
            total = total + (symbol + 1) * power & mask
        total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & mask
        total = (total ^ total >> 27) * 0x94D049BB133111EB & mask
        return total ^ total >> 31

    symbols = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 0]])
    hashed = string_hash(symbols, np.array([4, 2, 3])).tolist()
    assert hashed == [plain([1, 0, 1, 1]), plain([1, 0]), plain([1, 0, 1])]
