"""Two processes with the global batch train as one does; rows and measuring in scripts/equality.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
from equality import ROWS, SLOW, UNLIKE, both, differences

CLAIMED = 1e-5  # relative, in float32, after 20 steps
FAST = [row for row in ROWS if row not in SLOW]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return both(tmp_path_factory.mktemp("equality"), [*FAST, *UNLIKE])


@pytest.mark.parametrize("row", [row for row in FAST if "AdamW" not in row])
def test_losses_and_weights_are_those_of_one_process(sides: Any, row: str) -> None:
    losses, weights = differences(sides[0][row], sides[1][row])
    assert losses <= CLAIMED
    assert weights <= CLAIMED


@pytest.mark.parametrize("row", [row for row in FAST if "AdamW" in row])
def test_under_adamw_all_is_equal_whose_gradient_is_not_rounding_alone(sides: Any, row: str) -> None:
    assert max(differences(sides[0][row], sides[1][row], keys=False)) <= CLAIMED


@pytest.mark.parametrize("row", UNLIKE)
def test_where_no_equality_is_claimed_there_is_none(sides: Any, row: str) -> None:
    assert differences(sides[0][row], sides[1][row])[1] > 100 * CLAIMED


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(SLOW))
def test_compiled_too(tmp_path: Path, row: str) -> None:
    assert max(differences(*(side[row] for side in both(tmp_path, [row])))) <= CLAIMED
