"""Cost of a guided step, measured in turns with a plain step, the guide and the paper's formulation.

`settings` builds networks and rows, `variants` steps them, `meters` and `ratios` measure, and `table` shows the result.
"""
