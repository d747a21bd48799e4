"""A guided step, from `GuidanceLoss.watch` to the number that is logged, passes the files that CONTRIBUTING tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from scripts.walk import walk

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.mark.parametrize("settings", [{}, {"sample_axis": "token"}], ids=["sequence", "token"])
def test_a_guided_step_passes_the_twelve_files_that_contributing_names(settings: dict[str, Any]) -> None:
    files, _ = walk(**settings)
    told = CONTRIBUTING.read_text().partition("A guided step passes twelve files:")[2].partition(".\n")[0]
    assert files == [f"{name}.py" for name in re.findall(r"`([\w/]+)`", told)]
    assert len(files) == 12
