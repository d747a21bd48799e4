"""The notebook runs from top to bottom, in an empty folder and without a network; it is stored without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "recipes" / "guides" / "guidance.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
CHECKS = """
rises = [log["guidance/similarity"] for log in guided.state.log_history if "guidance/similarity" in log]
assert rises[-1] > rises[0]
assert after.values.shape == (4, 4)
assert torch.equal(rebuilt.wte.weight, guide.wte.weight)
print("RESULT", guided.predict(task.test_dataset).metrics["test_accuracy"] > 0.2)
"""


def test_it_is_stored_without_outputs_and_with_code_that_compiles() -> None:
    assert len(CODE) > 5
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)
    for number, code in enumerate(CODE):
        compile(code, f"cell {number}", "exec")


@pytest.mark.notebook
def test_the_cells_run_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text("\n\n".join([*CODE, CHECKS]), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "notebook.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "RESULT True" in done.stdout, done.stderr[-3000:]
