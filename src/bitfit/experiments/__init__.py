"""Grids of runs: the paper's tables and figures, and grids of the user's own."""
