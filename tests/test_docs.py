"""The documentation builds without a warning or a dead link, where pdoc is installed (`make docs` installs it)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pdoc")
SCRIPT = Path(__file__).parent / "scripts" / "docs.py"


def test_every_guide_and_every_public_name_has_its_place(tmp_path: Path) -> None:
    import hf_guidance

    root = SCRIPT.parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "docs")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in (root / "recipes" / "guides").glob("*.md"):
        assert (tmp_path / "docs" / "guides" / f"{path.stem}.html").is_file()
    reference = (tmp_path / "docs" / "hf_guidance.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in reference for name in hf_guidance.__all__)
