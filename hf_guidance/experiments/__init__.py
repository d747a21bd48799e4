"""Experiments: a setting chosen by inspection, matched runs with their records, tables and cards, the cost of a step.

`inspection` measures a trainer's networks and data, and proposes a setting. `matched_runs` compares a trainer of yours
alone, guided, and as `controls`; `recipe` does so for the recipes. `run` names and records a run, and `run_training`
trains it. `report`, `pages` and `cards` show runs, and `cost` measures guided steps.
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
