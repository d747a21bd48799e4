"""Figures of a run: its log history as curves, and maps of the similarity of all layers."""
