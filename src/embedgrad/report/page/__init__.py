"""One HTML page for a run or a comparison."""
