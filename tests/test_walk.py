"""A guided step, from `GuidanceLoss.watch` to the number that is logged, passes the files that CONTRIBUTING tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from scripts.walk import walk

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
LINEAR, DEFAULT = {"measure": "linear_cka"}, {"measure": "auto"}


@pytest.mark.parametrize(
    "samples",
    [{}, {"sample_axis": "token"}, {"sample_axis": "token", "max_tokens": 16}],
    ids=["rows", "tokens", "some of the tokens"],
)
@pytest.mark.parametrize(("measure", "count"), [(LINEAR, 11), (DEFAULT, 12)], ids=["linear CKA", "the default"])
def test_a_guided_step_passes_the_files_that_contributing_names(
    measure: dict[str, Any], count: int, samples: dict[str, Any]
) -> None:
    files, _ = walk(**measure, **samples)
    told = CONTRIBUTING.read_text().partition("A guided step passes twelve files:")[2].partition(".\n")[0]
    named = [f"{name}.py" for name in re.findall(r"`([\w/]+)`", told)]
    if measure == LINEAR:
        named.remove("similarity/regression.py")
    assert sorted(files) == sorted(named)
    assert len(files) == count
