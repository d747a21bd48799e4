"""What recipes share: matched runs, their records, tables and cards, baselines, and the cost of a step.

`recipe` is the main function of each, `comparison` carries out the runs, and `cost` measures what guidance costs.
"""
