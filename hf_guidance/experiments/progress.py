"""The plan of a recipe's runs: what will run, what is done and where it resumes; and the time that is left."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.baselines import LONGER, MARGIN, rate_name
from hf_guidance.experiments.files import read_json
from hf_guidance.experiments.run import Run
from hf_guidance.experiments.run_training import RESULT
from hf_guidance.experiments.verdicts import EQUAL_TIME
from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.environment import environment

COMPARED = ("torch", "transformers", "hf_guidance")  # whose versions change values
OF_LENGTH = re.compile(rf"({EQUAL_TIME}|{LONGER})-\d+")  # the folder of a baseline whose steps depend on times


@dataclass(frozen=True)
class Planned:
    """A run that is to be trained or read.

    Args:
        place: Its folder. That of a longer baseline lacks the steps, which are not known yet.
        kind: Name of the runs that take as long for a step.
        steps: Its optimizer steps; None for a longer baseline, which lasts 1.1 times the slowest run of its seed.
        guided: Whether it has a guide.
    """

    place: Path
    kind: str
    steps: int | None
    guided: bool = False

    def results(self) -> list[Path]:
        """Return its result, if it is there; of a longer baseline one of each length."""
        places = [self.place] if self.steps else self.place.parent.glob(f"{self.place.name}-*")
        return [place / RESULT for place in places if (place / RESULT).is_file()]

    def step(self) -> int:
        """Return the step that it resumes from, 0 if it begins."""
        last = last_complete_checkpoint(self.place)
        return int(last.rpartition("-")[2]) if last else 0


def planned_runs(
    recipe: RecipeArguments, runs: Callable[[int], Sequence[Run]], steps: int, folder: Path
) -> list[Planned]:
    """List the runs of one comparison in their order.

    Args:
        recipe: Seeds, learning rates to try, and longer baselines.
        runs: Seed → its runs.
        steps: Optimizer steps of a run that does not set its own.
        folder: Output folder of the comparison.
    """
    found = [
        Planned(folder / f"seed-{seed}" / rate_name("alone", rate), "alone", steps)
        for rate in dict.fromkeys(recipe.learning_rates or ())
        for seed in recipe.search_seeds
    ]
    for seed in recipe.seeds:
        for run in runs(seed):
            own, place = run.training.get("max_steps", steps), folder / f"seed-{seed}" / run.name
            found.append(Planned(place, run.name, own, run.guide is not None or run.trainer is not None))
    return found + [
        Planned(folder / f"seed-{seed}" / name, "alone", None) for name in _longer(recipe) for seed in recipe.seeds
    ]


def _longer(recipe: RecipeArguments) -> list[str]:
    asked = {EQUAL_TIME: recipe.equal_time_baseline, LONGER: recipe.longer_baseline}
    return [name for name in asked if asked[name]]


def in_lines(recipe: RecipeArguments, runs: Sequence[Run], steps: int) -> list[str]:
    """Describe the runs of one comparison: how many of which length, and what comes before and after them.

    Args:
        recipe: Seeds, learning rates to try, and longer baselines.
        runs: The runs of a seed.
        steps: Optimizer steps of a run that does not set its own.
    """
    own = {run.name: run.training.get("max_steps", steps) for run in runs}
    names = [name if length == steps else f"{name} ({length} steps)" for name, length in own.items()]
    seeds = f"{len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''} ({' '.join(map(str, recipe.seeds))})"
    lines = [f"{len(own)} run{'s' if len(own) > 1 else ''} × {seeds} × {steps} steps: {', '.join(names)}"]
    if rates := list(dict.fromkeys(recipe.learning_rates or ())):
        tried = ", ".join(f"{rate:g}" for rate in rates)
        lines.append(f"before them, {len(rates) * len(recipe.search_seeds)} runs of alone choose the rate: {tried}")
    lines += [
        f"after them, {name} for each seed, whose steps follow from the times of the guided runs"
        for name in _longer(recipe)
    ]
    return lines


class Progress:
    """The runs of a recipe that are done and left, and the time that each kind takes for a step.

    Args:
        planned: All runs, in their order.
    """

    def __init__(self, planned: Sequence[Planned]) -> None:
        self._all = {run.place: run for run in planned}
        self._left = {place: run for place, run in self._all.items() if not run.results()}
        self._seconds: dict[str, list[float]] = {}  # kind → seconds for a step, of each run

    def begin(self, folder: Path) -> str:
        """Return what is done already, by which other versions, and where the first unfinished run resumes.

        Args:
            folder: Output folder of the recipe.
        """
        return "\n".join(line for line in (self._done(folder), self._other_versions()) if line)

    def _done(self, folder: Path) -> str:
        done, every = len(self._all) - len(self._left), len(self._all)
        if not self._left:
            runs = "this run is" if every == 1 else f"all of these {every} runs are"
            return f"{runs} done already, and {'is' if every == 1 else 'are'} read from {folder}"
        begun = next(((run, step) for run in self._left.values() if run.steps and (step := run.step())), None)
        words = f"{done or 'none'} of these {every} runs {'is' if done < 2 else 'are'} done already"
        words = "this run is not done yet" if every == 1 else words
        if begun is not None:
            words += f"; {'/'.join(begun[0].place.parts[-2:])} resumes at step {begun[1]} of {begun[0].steps}"
        return f"{words}; results go to {folder}"

    def _other_versions(self) -> str:
        """Tell the versions that made the finished runs, where they are not today's; empty if they are."""
        now = environment()
        made = [read_json(path).get("environment", {}) for run in self._all.values() for path in run.results()]
        others = [own for own in made if any(own.get(name, now[name]) != now[name] for name in COMPARED)]
        words = [
            f"{name} {' and '.join(found)} (now {now[name]})"
            for name in COMPARED
            if (found := list(dict.fromkeys(own[name] for own in others if own.get(name, now[name]) != now[name])))
        ]
        runs = "1 finished run was" if len(others) == 1 else f"{len(others)} finished runs were"
        return f"{runs} made by other versions: {', '.join(words)}" if others else ""

    def leave_out(self, folder: Path, name: str) -> None:
        """Take the runs of one name out of the plan."""
        for place in [place for place in self._all if (place.parent.parent, place.name) == (folder, name)]:
            del self._all[place]
            self._left.pop(place, None)

    @contextmanager
    def running(self, place: Path) -> Iterator[None]:
        """Measure the run in this context, and print how many are done and the time left. A run that is read is silent.

        Args:
            place: Folder of the run.
        """
        match = OF_LENGTH.fullmatch(place.name)
        run = self._all.get(place.with_name(match[1]) if match else place)
        if run is None or not PartialState().is_main_process:
            yield
            return
        read, first, start = (place / RESULT).is_file(), run.step(), time.monotonic()
        try:
            yield
        finally:
            self._left.pop(run.place, None)  # one that diverges at its learning rate is not tried again either
        if not read:
            if run.steps and run.steps > first:
                self._seconds.setdefault(run.kind, []).append((time.monotonic() - start) / (run.steps - first))
            print(self, flush=True)

    def __str__(self) -> str:
        done, left = len(self._all) - len(self._left), self.seconds_left()
        return f"{done} of {len(self._all)} runs done" + (f", about {duration(left)} left" if left else "")

    def seconds_left(self) -> float:
        """Estimate the seconds that the rest takes, from its steps and the rate of the runs that were trained."""
        return sum(self._estimate(run) for run in self._left.values()) if self._seconds else 0.0

    def _estimate(self, run: Planned) -> float:
        if run.steps is None:  # as long as the slowest guided run of its seed, a tenth more
            others = [other for other in self._all.values() if other.place.parent == run.place.parent and other.steps]
            guided = [other for other in others if other.guided] or others
            return MARGIN * max((self._rate(other) * (other.steps or 0) for other in guided), default=0.0)
        return self._rate(run) * (run.steps - run.step())

    def _rate(self, run: Planned) -> float:
        """Return the seconds of a step: of runs of this kind, else of all that were trained."""
        return statistics.fmean(self._seconds.get(run.kind) or [s for found in self._seconds.values() for s in found])


def duration(seconds: float) -> str:
    """Write a duration in the unit that suits it, such as `40 s`, `14 min` or `2.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
