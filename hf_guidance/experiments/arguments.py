"""The flags that all recipes share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

INITIALISED = ("stopped", "decayed", "until_similar", "prealigned", "prealigned_on_noise")  # ends of runs' names
SEEDS = 2**32  # numpy takes seeds below this


@dataclass
class RecipeArguments:
    """The flags that all recipes share; each recipe adds its own."""

    preset: str = field(
        default="small",
        metadata={"help": "small (for two CPU cores) or paper (the sizes of the paper, for a GPU)."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One set of matched runs per seed."})
    runs: Optional[list[str]] = field(default=None, metadata={"help": "Names of the matched runs to train; see above."})
    claim: Optional[str] = field(
        default=None,
        metadata={"help": "A claim of the paper: stands for the flags of its comparison, which other flags replace."},
    )
    config: Optional[str] = field(
        default=None, metadata={"help": "A YAML or JSON file with flags; those on the command line replace them."}
    )
    learning_rates: Optional[list[float]] = field(
        default=None,
        metadata={"help": "Train the target alone at each of these; all runs use the best on validation data."},
    )
    search_seeds: list[int] = field(
        default_factory=lambda: [100, 101],
        metadata={"help": "Seeds for --learning_rates, none of which may be among --seeds."},
    )
    equal_time_baseline: bool = field(
        default=False,
        metadata={"help": "Also train the target alone for 1.1 times the training time of the slowest guided run."},
    )
    equal_time_to: Optional[str] = field(
        default=None, metadata={"help": "The guided run that --equal_time_baseline goes by; default the slowest."}
    )
    longer_baseline: bool = field(
        default=False,
        metadata={"help": "Also train the target alone for longer: twice the steps, and equal training time."},
    )
    eval_size: Optional[int] = field(default=None, metadata={"help": "Rows for validation, and rows for the test."})
    dimension_rows: Optional[int] = field(
        default=None,
        metadata={"help": "Measure the intrinsic dimension of the target's layers on so many validation rows."},
    )
    film_steps: Optional[int] = field(
        default=None,
        metadata={"help": "Map the similarity of all layers every so many steps, and draw a film of each guided run."},
    )
    stop_step: Optional[int] = field(
        default=None, metadata={"help": "Step at which *_stopped and *_decayed runs end guidance; default a third."}
    )
    stop_similarity: float = field(
        default=0.9, metadata={"help": "Mean similarity at which the *_until_similar runs stop guidance."}
    )
    guide_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate for training the guide itself."}
    )
    guide_max_steps: Optional[int] = field(default=None, metadata={"help": "Steps for training the guide itself."})

    def guide_training(self) -> dict[str, Any]:
        """Return the `TrainingArguments` fields that were given for the guide's own training."""
        own = {"learning_rate": self.guide_learning_rate, "max_steps": self.guide_max_steps}
        return {name: value for name, value in own.items() if value is not None}

    def initialisations(self, runs: Iterable[str], steps: int) -> dict[str, dict[str, Any]]:
        """Return the ways to guide at the start only: end of a run's name → its `GuidanceConfig` fields.

        Args:
            runs: Names of all runs.
            steps: Optimizer steps of a run.

        Raises:
            ValueError: If one of the runs is to stop, and `stop_step` is not within its steps.
        """
        stopping = [run for run in runs if run.endswith(("_stopped", "_decayed"))]
        if stopping and self.stop_step is not None and not 0 < self.stop_step < steps:
            raise ValueError(
                f"--stop_step is {self.stop_step}; {stopping[0]} stops guidance within its {steps} steps: "
                f"choose from 1 to {steps - 1}."
            )
        stop = max(1, steps // 3) if self.stop_step is None else self.stop_step
        before = {"prealign_steps": max(1, steps // 10), "guidance_stop_step": max(1, steps // 10)}
        return {
            "_stopped": {"guidance_stop_step": stop},
            "_decayed": {"guidance_schedule": "linear", "guidance_stop_step": stop},
            "_until_similar": {"guidance_stop_similarity": self.stop_similarity},
            "_prealigned": before,
            "_prealigned_on_noise": before | {"guide_input": "prealign_noise"},
        }


def check_numbers(recipe: RecipeArguments) -> None:
    """Raise ValueError for a learning rate or a seed that no run could take. `command_line.parse` calls this."""
    own = [] if recipe.guide_learning_rate is None else [recipe.guide_learning_rate]
    rates = {"learning_rates": recipe.learning_rates or [], "guide_learning_rate": own}
    for flag, values in rates.items():
        if wrong := [rate for rate in values if not (math.isfinite(rate) and rate > 0)]:
            raise ValueError(f"--{flag} is {wrong[0]:g}; a learning rate is a finite number above 0.")
    for flag, seeds in {"seeds": recipe.seeds, "search_seeds": recipe.search_seeds}.items():
        if outside := [seed for seed in seeds if not 0 <= seed < SEEDS]:
            raise ValueError(f"--{flag} names {outside[0]}; a seed is an integer from 0 to {SEEDS - 1}.")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"--{flag} {' '.join(map(str, seeds))} names a seed twice: name each once.")
