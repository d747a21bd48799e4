"""The baseline's fair chance: its learning rate, and as much training time as guidance takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from accelerate import PartialState

from hf_guidance.experiments.report import Record
from hf_guidance.experiments.run import Run
from hf_guidance.experiments.verdicts import EQUAL_TIME

LONGER = "alone_longer"
MARGIN = 1.1  # of the time that the baseline gets, beyond that of the slowest guided run


def say_edge(best: float, rates: Sequence[float]) -> None:
    """Say so if the best learning rate is the lowest or the highest of those that were tried."""
    if len(set(rates)) > 1 and best in (min(rates), max(rates)) and PartialState().is_main_process:
        print(f"The best learning rate, {best:g}, is at the edge of {sorted(set(rates))}: try more on that side.")


def equal_time(run: Run, steps: int, results: list[Record], of: str | None = None) -> Run:
    """Return the unguided run, trained for 1.1 times the time of a guided run of its seed.

    Args:
        run: The unguided run.
        steps: Its optimizer steps.
        results: Records of the finished runs.
        of: Name of the guided run; the slowest if None.
    """
    own = [r for r in results if r["seed"] == run.seed]
    guided = max((r["seconds"] for r in own if r["guide"] and of in (None, r["run"])), default=0.0)
    more = math.ceil(max(1.0, MARGIN * guided / next(r["seconds"] for r in own if r["run"] == "alone")) * steps)
    return replace(run, name=f"{EQUAL_TIME}-{more}", training={"max_steps": more})


def longer(run: Run, steps: int, results: list[Record]) -> Run:
    """Return the unguided run, trained for twice the steps or 1.25 times the time of the slowest guided run of its
    seed.

    It takes whichever is longer.
    """
    own = [r for r in results if r["seed"] == run.seed]
    guided = max((r["seconds"] for r in own if r["guide"]), default=0.0)
    times = guided / next(r["seconds"] for r in own if r["run"] == "alone")
    more = int(steps * max(2.0, 1.25 * times) + 1)
    return replace(run, name=f"{LONGER}-{more}", training={"max_steps": more})
