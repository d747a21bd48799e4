"""Experiments: a setting chosen by inspection, matched runs with their records, tables and cards, the cost of a step.

`inspection` measures a trainer's networks and data and proposes a setting: `measurements` holds the numbers,
`guidance_measuring` takes them, `proposals` has the rules and `inspection_report` the text. `matched_runs` compares a
user's own trainer alone, guided, and as the `controls`. `recipe` holds the main function of the recipes, `recipe_runs`
their runs in order, `progress` what is left of them and `publishing` what is written; `comparison` carries one out.
`run` names and records one and `run_training` trains it, for both. `cards` and `report` show runs, and `cost` measures
guided steps.
"""

from hf_guidance.experiments.controls import MatchedRun
from hf_guidance.experiments.inspection import Inspection, inspect
from hf_guidance.experiments.matched_runs import MatchedRuns, compare_runs
from hf_guidance.experiments.measurements import Measurements, PairMeasurement, Spread, StepCost

__all__ = [
    "Inspection",
    "MatchedRun",
    "MatchedRuns",
    "Measurements",
    "PairMeasurement",
    "Spread",
    "StepCost",
    "compare_runs",
    "inspect",
]
