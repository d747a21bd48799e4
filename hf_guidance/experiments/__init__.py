"""Experiments: a setting chosen by inspection, matched runs with their records, tables and cards, the cost of a step.

`inspection` measures a trainer's networks and data and proposes a setting: `measurements` holds the numbers,
`guidance_measuring` takes them, `proposals` has the rules and `inspection_report` the text. `recipe` holds the main
function of the recipes, `comparison` trains the runs, `run` names and records one, `cards` and `report` show them, and
`cost` measures guided steps. Recipes import from the files.
"""

from hf_guidance.experiments.inspection import Inspection, inspect
from hf_guidance.experiments.measurements import Measurements, PairMeasurement, Spread, StepCost

__all__ = ["Inspection", "Measurements", "PairMeasurement", "Spread", "StepCost", "inspect"]
