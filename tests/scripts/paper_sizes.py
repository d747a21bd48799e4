"""Trains copy-paste and parity at the paper's sizes, as far as eight minutes on a GPU carry one seed.

python tests/scripts/paper_sizes.py outputs/paper_sizes
python tests/scripts/paper_sizes.py outputs/paper_sizes --dry --minutes 1

It prints how far each run came, beside the paper's figure. The same command goes on where the last one stopped, so
that several calls carry the runs to their end. `--dry` trains small networks for a few steps, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

RECIPE = Path(__file__).parents[2] / "recipes" / "rnn_vs_transformer.py"
DRY = "--preset small --max_steps 4 --guide_max_steps 4 --eval_steps 2 --logging_steps 1 --save_steps 2 --eval_size 64"
FULL = "--preset paper --eval_steps 500 --logging_steps 100 --save_steps 500 --guide_max_steps 10000 --eval_size 5000"


class Part(NamedTuple):
    """One run, its share of the time, and the paper's test accuracy in percent; None for a guide."""

    task: str
    run: str
    share: float
    paper: float | None


PARTS = (
    Part("copy_paste", "alone", 0.2, 14.35),
    Part("copy_paste", "untrained_guide", 0.3, 42.56),
    Part("parity", "guide_itself", 0.2, None),
    Part("parity", "alone", 0.1, 71.98),
    Part("parity", "trained_guide", 0.2, 78.49),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    lines = ["| task | run | steps | accuracy (validation, until the run ends) | paper, test | seconds of this call |"]
    lines.append("|---|---|---|---|---|---|")
    for part in PARTS:
        began = time.monotonic()
        folder = given.folder / part.task
        command = [sys.executable, str(RECIPE), "--task", part.task, "--runs", part.run, "--output_dir", str(folder)]
        command += [*(DRY if given.dry else FULL).split(), "--disable_tqdm", "true"]
        said = ""
        try:
            limit = 60 * given.minutes * part.share
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            said = "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]
        except subprocess.TimeoutExpired:
            pass  # the next call resumes
        steps, accuracy = reached(folder / "seed-0" / part.run)
        shown = "–" if accuracy is None else f"{100 * accuracy:.2f} %"
        paper = "–" if part.paper is None else f"{part.paper} %"
        seconds = time.monotonic() - began
        lines.append(f"| {part.task} | {part.run} | {steps} | {shown} | {paper} | {seconds:.0f} |")
        print(said or lines[-1], flush=True)
    print("\n" + "\n".join(lines))


def reached(place: Path) -> tuple[int, float | None]:
    """Return the steps of a run, and its test accuracy, or its last one on validation data if it has not ended."""
    if (place / "result.json").is_file():
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        return result["steps"], result["test"]["accuracy"]
    states = sorted(place.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return 0, None
    state = json.loads(states[-1].read_text(encoding="utf-8"))
    found = [log["eval_accuracy"] for log in state["log_history"] if "eval_accuracy" in log]
    return state["global_step"], found[-1] if found else None


if __name__ == "__main__":
    main()
