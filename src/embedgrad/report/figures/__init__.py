"""Figures of runs and comparisons, drawn with matplotlib."""
