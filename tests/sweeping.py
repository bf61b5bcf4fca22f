"""A small grid for test_sweep and test_cluster, and the processes of it that are killed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bitfit.experiments.cluster import Job, new_job
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


def write_tickets(folder: Path) -> Path:
    """Write the grid's data into a folder, and return the folder."""
    draw = random.Random(0)
    lines = ["body,intent"]
    for i in range(40):
        words = draw.choices("the a film bike order is was very we it this that".split(), k=4)
        word = draw.choice((["good", "nice", "fast"], ["bad", "broken", "late"])[i % 2])
        lines.append(f"{' '.join([*words[:2], word, *words[2:]])},{('praise', 'complaint')[i % 2]}")
    (folder / "tickets.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def small_grid(base: str, **changes: object) -> Grid:
    """The grid above on a tiny base."""
    return parse_grid(GRID, "small.toml", default_name="small").replace(base=(base,), **changes)


def small_sweep(base: str, data: str, out: str, **settings: object) -> Sweep:
    """A sweep of it."""
    torch.set_num_threads(1)
    options = {"lanes": 2, "threads": 1, "resume": True} | settings
    return Sweep(small_grid(base), Path(out), Settings(data=Path(data), **options))


def left_in(folder: Path) -> list[Path]:
    """What is in a folder, but for what kill -9 leaves of a write: a hidden file nobody reads."""
    return [path for path in folder.iterdir() if not path.match(".*.tmp")]


def run_small(base: str, data: str, out: str, **settings: object) -> None:
    """Run it to its end, saving the state after every step; in a process of its own."""
    train.CHECKPOINT_SECONDS = train.CHECKPOINT_PAUSE = 0.0
    small_sweep(base, data, out, **settings).run()


def drive(environment: dict[str, str], *arguments: str, **settings: object) -> None:
    """The same as :func:`run_small` in another environment: of a cluster, say, with its secret."""
    os.environ.update(environment)
    run_small(*arguments, **settings)


def with_data(data: Path) -> Callable[..., Job]:
    """Workers find other data than the driver."""
    return lambda *arguments: replace(new_job(*arguments), data=data)
