"""Cost of a guided step, measured in turns with a plain step, the guide and the paper's formulation.

`settings` builds networks and rows, `variants` steps them, `measuring` measures them in turns by `meters`, `ratios`
divides, and `table` shows the result. `paper_formulation` is the step of the paper's code.
"""
