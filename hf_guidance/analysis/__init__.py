"""What people look at: the history of a run as curves, and maps of the similarity of all layers, as figures."""
