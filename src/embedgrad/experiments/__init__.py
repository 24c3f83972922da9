"""Whole runs: run, plan, compare, interpolate."""
