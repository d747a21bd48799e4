"""What a guided step costs: measured in turns beside a plain step, the guide and the paper's formulation."""
