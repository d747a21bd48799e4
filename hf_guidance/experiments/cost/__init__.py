"""Cost of a guided step, measured in turns with a plain step, the guide and the paper's formulation."""
