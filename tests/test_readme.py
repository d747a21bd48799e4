"""Every Python block of the README runs as printed, in order, from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

from test_imports import BESIDE, ROOMS

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


CHECKS = """
assert trainer.state.global_step == 60
assert all(log["guidance/weight"] == 1 for log in trainer.state.log_history if "guidance/loss" in log)
assert trainer.state.log_history[0]["guidance/loss"] > 0
assert found.values.shape == (4, 4)
assert found.samples == 500
assert found.errors.max() < 0.2
assert (args.output_dir, guidance.measure) == ("out", "rsa")
print("RESULT")
"""


def test_the_blocks_run_as_printed_one_after_another_from_an_empty_folder_without_a_hub(tmp_path: Path) -> None:
    assert len(BLOCKS) == 3
    (tmp_path / "train.py").write_text("\n\n".join([*BLOCKS, CHECKS]))
    command = [sys.executable, "train.py", "--output_dir", "out", "--measure", "rsa"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "RESULT" in done.stdout, done.stderr[-3000:]


def test_it_is_one_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert all(len(block.splitlines()) < 25 for block in BLOCKS)


def test_the_first_example_costs_few_tokens() -> None:
    assert "max_tokens=256" in BLOCKS[0]


def test_the_tree_lists_the_rooms_in_their_order() -> None:
    tree = re.search(r"```\nhf_guidance/\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert tree
    listed = [line.split()[0] for line in tree[1].splitlines() if line.startswith("  ")]
    rooms = [name if (README.parent / "hf_guidance" / name).is_dir() else f"{name}.py" for name in ROOMS]
    assert [name.rstrip("/") for name in listed] == [*rooms, *sorted(BESIDE)]
