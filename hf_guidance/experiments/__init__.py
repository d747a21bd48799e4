"""Experiments: matched runs with their records, tables and cards, baselines, and the cost of a guided step.

`recipe` holds the main function of the recipes, `comparison` trains the runs, `run` names and records one, `cards` and
`report` show them, and `cost` measures guided steps. Recipes import from the files; nothing is handed on here.
"""
