"""A small grid for test_sweep, and the process of it that is killed."""

from __future__ import annotations

from pathlib import Path

import torch

from bitfit.experiments.grid import Grid, parse_grid
from bitfit.experiments.sweep import Settings, Sweep
from bitfit.training import train

GRID = """
title = "Small"
tasks = [{ name = "tickets", data = "tickets.csv", text = "body", label = "intent", dev_fraction = 0.4 }]
epochs = 2
seeds = [0, 1, 2]

[[rows]]
name = "BitFit"
learning_rate = [1e-2, 1e-3, 1e-4]

[[rows]]
name = "Frozen"
method = "frozen"
learning_rate = [1e-2, 1e-3]

[[rows]]
name = "Full-FT"
method = "full"
learning_rate = [1e-3]
"""  # noqa: E501


def small_grid(base: str, **changes: object) -> Grid:
    """The grid above on a tiny base."""
    return parse_grid(GRID, "small.toml", default_name="small").replace(base=(base,), **changes)


def small_sweep(base: str, data: str, out: str, **settings: object) -> Sweep:
    """A sweep of it that saves the state after every step."""
    torch.set_num_threads(1)
    train.CHECKPOINT_SECONDS = train.CHECKPOINT_PAUSE = 0.0
    options = {"lanes": 2, "threads": 1, "resume": True} | settings
    return Sweep(small_grid(base), Path(out), Settings(data=Path(data), **options))


def run_small(base: str, data: str, out: str) -> None:
    """Run it to its end; in a process of its own."""
    small_sweep(base, data, out).run()
