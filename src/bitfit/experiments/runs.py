"""One run of a grid: what it depends on, and the id that is the hash of it."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bitfit.data import DataConfig
from bitfit.experiments.conditions import Conditions
from bitfit.experiments.grid import GridTask, Row
from bitfit.storage import dump_json
from bitfit.training.settings import ROW_METHODS, TrainConfig, resolve_config

ID_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a row of the grid, on a task, at a rate, with a seed."""

    row: Row
    base: str
    task: GridTask
    train_rows: int | None
    """Training rows asked for; None: all."""
    config: TrainConfig
    data_seed: int
    """Seed of the choice of training rows and of what is held out."""
    facts: tuple[tuple[str, str], ...]
    """Hashes of base, tokenizer and data, and the precision: the rest of what it depends on."""

    @cached_property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all that the run depends on."""
        # Without what is None: an option that a later version adds leaves the ids as they are.
        config = {k: v for k, v in self.config.to_json().items() if v is not None}
        text = dump_json({"config": config, **dict(self.facts)})
        return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]

    def in_dtype(self, dtype: str) -> Run:
        """Return the same run in another precision, which has another id."""
        return replace(self, facts=tuple((dict(self.facts) | {"dtype": dtype}).items()))

    @property
    def shares_passes(self) -> bool:
        """Whether it trains rows of a bank, so that others can be trained beside it."""
        return self.config.method in ROW_METHODS

    @property
    def material(self) -> tuple[str, int | None, int]:
        """Task, training rows and seed: the data that it learns from."""
        return self.task.name, self.train_rows, self.data_seed

    @property
    def cell(self) -> tuple[str, str, int | None]:
        """Row, task and training rows: what it is one rate and seed of, on its base."""
        return self.row.name, self.task.name, self.train_rows

    def title(self, rate: str) -> str:
        """Return what a reader knows it by, at a rate in words."""
        size = "" if self.train_rows is None else f", {self.train_rows:,} rows"
        return f"{self.row.name} on {self.task.name}{size}, {rate}, seed {self.config.seed}"

    def __str__(self) -> str:
        """Return what a reader knows it by."""
        return self.title(f"rate {self.config.learning_rate:g}")


def data_config(task: GridTask, data: Path, train_rows: int | None, seed: int) -> DataConfig:
    """Return what to read for a task below the data directory ``data``."""
    options = dict(task.data)
    place = options.pop("data", None)
    is_hub = place is not None and str(place).startswith("hub:")
    options["data"] = data if place is None else place if is_hub else data / str(place)
    for name in ("dev", "test"):
        if name in options and not is_hub:
            options[name] = data / str(options[name])
    return DataConfig(limit=train_rows, seed=seed, **options)


def command_of(run: Run, data: Path, conditions: Conditions) -> str:
    """Return the command that makes this one run again, alone."""
    source = data_config(run.task, data, run.train_rows, run.data_seed)
    words = ["bitfit", "train", "--base", run.base, "--data", str(source.data)]
    for field in fields(DataConfig):
        # The test split is not read, and the seed stands below.
        if field.name not in ("data", "splits", "test", "seed"):
            words += _option(field.name, getattr(source, field.name), field.default)
    usual = resolve_config(run.config.recipe, method=run.config.method).to_json()
    words += ["--recipe", run.config.recipe, "--method", run.config.method]
    for name, value in run.config.to_json().items():
        if name not in ("recipe", "method"):
            # What is usual depends on the kind of task.
            words += _option(name, value, None if name == "max_length" else usual[name])
    words += ["--data-seed", str(run.data_seed), "--dtype", conditions.dtype]
    words += ["--device", conditions.device, "--threads", str(conditions.threads)]
    return shlex.join([*words, "--train-score", "--json"])


_FLAGS = {"learning_rate": "--lr", "train_split": "--split"}


def _option(name: str, value: Any, usual: Any) -> list[str]:
    """Return the words of a command-line option; none where ``value`` is what it has anyway."""
    if value == usual:
        return []
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if isinstance(value, bool):
        return [flag]
    return [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
