"""Experiments: matched runs with their records, tables and cards, baselines, and the cost of a guided step.

`recipe` holds the main function of the recipes, `comparison` trains the runs, and `cost` measures guided steps.
"""
