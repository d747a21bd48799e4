"""Two processes with the global batch train as one does; rows and measuring in scripts/equality.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from equality import OPTIMIZERS, ROWS, SLOW, UNLIKE, both, differences

CLAIMED = 1e-5  # relative, in float32, after 20 steps
STEPS = 8  # here; all 20 in the slow tests
# an Adam step divides a gradient near zero by its own size, rounding and all; seen: 9e-6, of one bias of 8 numbers
UNDER_ADAMW = {"tokens, 12 of them": 3e-5, "a guide on 3 of the rows": 5e-5}  # few samples amplify rounding
# torch 2.9 rounds more where few samples are compared; seen: 1.7e-5
UNDER_SGD = {"a guide on 3 of the rows": 2e-5} if torch.__version__.startswith("2.9.") else {}
FAST = [row for row in ROWS if row not in SLOW]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return both(tmp_path_factory.mktemp("equality"), [*FAST, *UNLIKE], STEPS)


@pytest.mark.parametrize("row", FAST)
def test_losses_and_weights_are_those_of_one_process(sides: Any, row: str) -> None:
    one, two = (side[row, "SGD"] for side in sides)
    assert max(differences(one, two)) <= UNDER_SGD.get(row, CLAIMED)


@pytest.mark.parametrize("row", FAST)
def test_under_adamw_all_is_equal_whose_gradient_is_not_rounding_alone(sides: Any, row: str) -> None:
    one, two = (side[row, "AdamW"] for side in sides)
    assert max(differences(one, two, keys=False)) <= UNDER_ADAMW.get(row, CLAIMED)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("row", UNLIKE)
def test_where_no_equality_is_claimed_there_is_none(sides: Any, row: str, optimizer: str) -> None:
    one, two = (side[row, optimizer] for side in sides)
    assert differences(one, two)[1] > 100 * CLAIMED


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_after_20_steps_and_compiled_too(tmp_path: Path, row: str) -> None:
    one, two = both(tmp_path, [row])
    for optimizer, seen in (("SGD", UNDER_SGD), ("AdamW", UNDER_ADAMW)):
        found = differences(one[row, optimizer], two[row, optimizer], keys=optimizer == "SGD")
        assert max(found) <= seen.get(row, CLAIMED)
