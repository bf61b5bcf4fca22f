"""The records of an experiment in the order in which a report shows them, each cell with its runs.

A *line* is what a row of a table stands for: a row of the grid on a base, with so many training
rows. A *column* is a task, or MNLI's mismatched half. A cell is a line and a column; which of its
runs count is chosen on dev (:mod:`bitfit.experiments.protocol`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bitfit.experiments import protocol
from bitfit.experiments.grid import Row
from bitfit.experiments.report.paper import task_title
from bitfit.experiments.report.table import Summary

Record = Mapping[str, Any]
MISMATCHED = "dev_mismatched"


class Records(Protocol):
    """What a report reads: a :class:`bitfit.experiments.store.Store`, or any that has the same."""

    directory: Path

    def experiment(self) -> dict[str, Any]:
        """Return what ``experiment.json`` holds."""

    def records(self) -> list[dict[str, Any]]:
        """Return every record, in the order of the experiment."""

    def predictions(self, record: Mapping[str, Any], /) -> dict[str, Any] | None:
        """Return a run's predictions on dev by epoch, None where they are not kept."""

    def answers(self, record: Mapping[str, Any], /) -> Sequence[Any] | None:
        """Return what is right for each dev row of a run, None where they are not kept."""


@dataclass(frozen=True)
class Line:
    """A row of the grid on one base with so many training rows."""

    row: str
    base: str
    train_rows: int | None
    """As asked for, None: all. Of an experiment where each task has one size: None."""


@dataclass(frozen=True)
class TaskColumn:
    """A task, or another split of its dev rows."""

    key: str
    """``mnli`` or ``mnli-mm``."""
    task: str
    title: str
    metric: str
    split: str = "dev"


class Results:
    """The records of one experiment, sorted into lines and columns."""

    def __init__(self, store: Records) -> None:
        self.store = store
        self.experiment: dict[str, Any] = store.experiment()
        self.records: list[dict[str, Any]] = store.records()
        self.done = [r for r in self.records if r["state"] == "done"]
        self.failed = [r for r in self.records if r["state"] != "done"]

    # ------------------------------------------------------------------ names

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """Every line that has a record, by row, base and number of training rows."""
        rows = _ordered(self.experiment.get("rows"), (r["row"] for r in self.records))
        bases = _ordered(self.experiment.get("base"), (r["base"] for r in self.records))
        found = {self.line_of(record) for record in self.records}
        return tuple(
            sorted(
                found,
                key=lambda x: (bases.index(x.base), rows.index(x.row), _size(x.train_rows)),
            )
        )

    @cached_property
    def has_sizes(self) -> bool:
        """Whether a task was trained on several numbers of rows, as for a learning curve."""
        sizes: dict[str, set[int | None]] = {}
        for record in self.records:
            sizes.setdefault(record["task"]["name"], set()).add(record["train_rows"])
        return any(len(found) > 1 for found in sizes.values())

    def line_of(self, record: Record) -> Line:
        """Return the line of a record."""
        size = record["train_rows"] if self.has_sizes else None
        return Line(record["row"], record["base"], size)

    def limits(self) -> dict[str, int]:
        """Return the tasks that were trained on a part of their rows, with its size."""
        if self.has_sizes:
            return {}
        sizes = {r["task"]["name"]: r["train_rows"] for r in self.records}
        return {task: sizes[task] for task in self.tasks if sizes[task] is not None}

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that have a record, in the experiment's order."""
        have = [r["task"]["name"] for r in self.records]
        return tuple(t for t in _ordered(self.experiment.get("tasks"), have) if t in have)

    @cached_property
    def columns(self) -> tuple[TaskColumn, ...]:
        """A column per task; after MNLI's its mismatched half where it was scored."""
        columns = []
        for task in self.tasks:
            metric = self.metric(task)
            columns.append(TaskColumn(task, task, task_title(task), metric))
            own = (r for r in self.done if r["task"]["name"] == task)
            if any(self._mismatched(r, r["best_epoch"]) for r in own):
                key = f"{task}-mm"
                columns.append(TaskColumn(key, task, task_title(key), metric, MISMATCHED))
        return tuple(columns)

    def metric(self, task: str) -> str:
        """Return the headline metric of a task."""
        record = next(r for r in self.records if r["task"]["name"] == task)
        return str(record["task"]["metrics"][0])

    @cached_property
    def bases(self) -> dict[str, str]:
        """Base -> the name to print."""
        names = {r["base"]: r["base"] for r in self.records}
        return names | {r["base"]: r["base_name"] for r in self.records if r.get("base_name")}

    def label(self, line: Line) -> str:
        """Return what names a line: its row, and what else differs between lines."""
        parts = [line.row]
        if len({x.base for x in self.lines}) > 1:
            parts.append(self.bases[line.base])
        if self.has_sizes:
            parts.append("all rows" if line.train_rows is None else f"{line.train_rows:,} rows")
        return ", ".join(parts)

    @property
    def commands(self) -> list[str]:
        """The commands that the experiment's runs are of, the first first."""
        found = self.experiment.get("commands") or [self.experiment.get("command")]
        return [shown_command(str(command)) for command in found if command]

    @property
    def paper(self) -> str | None:
        """The key of the printed numbers to set beside ours."""
        return self.experiment.get("paper")

    def reference(self, line: Line) -> Line | None:
        """Return the line that ``line`` is compared with; None for itself or where there is none.

        The experiment's reference row on the same base with as many training rows.
        """
        row = self.experiment.get("reference_row")
        found = Line(row or "", line.base, line.train_rows)
        return found if found in self.lines and found != line else None

    # ------------------------------------------------------------------ runs

    @cached_property
    def _chosen(self) -> dict[str, dict[protocol.Cell, list[protocol.Choice]]]:
        return {
            "paper": protocol.choose(self.records, protocol.paper_scores),
            "split": protocol.choose(self.records, self._split_scores),
        }

    def _split_scores(self, record: Record) -> protocol.EpochScores | None:
        return protocol.split_scores(
            record, self.store.predictions(record), self.store.answers(record)
        )

    def choices(self, way: str, line: Line, task: str) -> list[protocol.Choice]:
        """Return the runs of a cell that count, seed by seed; [] where there are none.

        Args:
            way: ``paper`` or ``split``.
            line: the line.
            task: the name of the task.
        """
        size = line.train_rows if self.has_sizes else self.limits().get(task)
        return self._chosen[way].get((line.row, line.base, task, size), [])

    def summary(self, way: str, line: Line, column: TaskColumn) -> Summary:
        """Return the scores of a cell over its seeds."""
        choices = self.choices(way, line, column.task)
        if column.split == "dev":
            scores = tuple(c.score for c in choices)
            return Summary(scores, tuple(c.record["id"] for c in choices))
        found = [(c.record["id"], self._mismatched(c.record, c.epoch)) for c in choices]
        if not all(scores for _, scores in found):
            return Summary(())  # a mean over some of the seeds would be beside those over all
        return Summary(
            tuple(to_float(scores.get(column.metric)) for _, scores in found),
            tuple(run for run, _ in found),
        )

    def conditions(self, runs: Iterable[str]) -> list[str]:
        """Return the distinct precisions and devices that runs were made in: ``fp32 on cpu``."""
        return list(dict.fromkeys(self._conditions[run] for run in runs))

    @cached_property
    def _conditions(self) -> dict[str, str]:
        found = {r["id"]: r.get("environment") or {} for r in self.done}
        return {
            run: " on ".join(str(e[key]) for key in ("dtype", "device") if key in e)
            for run, e in found.items()
        }

    def share(self, line: Line) -> float | None:
        """Return the share of the encoder's parameters that the runs of a line train, their mean.

        None where it is not known: runs of earlier versions do not say how many the base has, but
        for those of full fine-tuning.
        """
        known = [r for r in self.done if r.get("trainable") and r["base"] == line.base]
        full = [r["trainable"]["encoder"] for r in known if r["config"]["method"] == "full"]
        counts = [
            (r["trainable"]["encoder"], r["trainable"].get("of") or (full[0] if full else None))
            for r in known if self.line_of(r) == line
        ]  # fmt: skip
        shares = [own / whole for own, whole in counts if whole]
        return sum(shares) / len(shares) if shares else None

    def runs(self, line: Line, task: str) -> list[dict[str, Any]]:
        """Return every finished run of a cell, at any rate."""
        return [r for r in self.done if (self.line_of(r), r["task"]["name"]) == (line, task)]

    def failures(self, line: Line, task: str, rate: float | None = None) -> int:
        """Return how many runs of a cell failed, at one rate or at any."""
        return sum(
            (self.line_of(r), r["task"]["name"]) == (line, task)
            and rate in (None, r["config"]["learning_rate"])
            for r in self.failed
        )

    def by_rate(self, line: Line, task: str) -> dict[float, list[dict[str, Any]]]:
        """Return the finished runs of a cell by learning rate, rates rising."""
        runs = self.runs(line, task)
        rates = sorted({r["config"]["learning_rate"] for r in runs})
        return {x: [r for r in runs if r["config"]["learning_rate"] == x] for x in rates}

    @cached_property
    def _rates_wanted(self) -> dict[str, tuple[float, ...]]:
        rows = (self.experiment.get("grid") or {}).get("rows") or ()
        return {
            row["name"]: Row(
                name=row["name"], options=row["options"], learning_rate=tuple(row["learning_rate"])
            ).rates
            for row in rows
        }

    def search_of(self, line: Line, task: str) -> tuple[int, int]:
        """Return how many rates of a cell's search have a run, and how many it is to have.

        The same number twice where the experiment does not say.
        """
        tried = {
            r["config"]["learning_rate"] for r in self.records
            if (self.line_of(r), r["task"]["name"]) == (line, task)
        }  # fmt: skip
        return len(tried), len(tried | {*self._rates_wanted.get(line.row, ())})

    def missing(self) -> int:
        """Return how many cells of rows, bases, tasks, sizes and seeds have no run."""
        sizes = {line.train_rows for line in self.lines} or {None}
        # A learning curve goes as far as the rows of a task do.
        own: dict[str, set[int | None]] = {}
        for record in self.records:
            own.setdefault(record["task"]["name"], set()).add(self.line_of(record).train_rows)
        axes = (self.experiment.get(key) or [] for key in ("rows", "base", "tasks", "seeds"))
        rows, bases, tasks, seeds = axes
        have = {(self.line_of(r), r["task"]["name"], r["config"]["seed"]) for r in self.records}
        wanted = {
            (Line(row, base, size), task, seed)
            for row in rows for base in bases for task in tasks
            for size in own.get(task, sizes) for seed in seeds
        }  # fmt: skip
        return len(wanted - have)

    @staticmethod
    def _mismatched(record: Record, epoch: int) -> Mapping[str, Any]:
        """Return the scores of an epoch; earlier versions have them of the best one only."""
        more = record["history"][epoch - 1].get("more")
        if more is None and epoch == record["best_epoch"]:
            more = record.get("more")
        found: Mapping[str, Any] = (more or {}).get(MISMATCHED) or {}
        return found


def to_float(value: float | None) -> float:
    """Return a score of a record, NaN for null."""
    return math.nan if value is None else float(value)


def dev_score(choice: protocol.Choice, metric: str) -> float:
    """Return any dev metric of a chosen run at the epoch that counts."""
    return to_float(choice.record["history"][choice.epoch - 1]["dev"].get(metric))


def _ordered(first: Iterable[str] | str | None, then: Iterable[str]) -> list[str]:
    first = [first] if isinstance(first, str) else first or []
    return list(dict.fromkeys([*first, *then]))


def _size(train_rows: int | None) -> float:
    return math.inf if train_rows is None else train_rows


def shown_command(command: str) -> str:
    """Return a command on one line, with ``DATA`` for the folder of the data.

    Where a machine had it says nothing to who reads the report, and differs from run to run where
    several machines worked.
    """
    return re.sub(r"(--data)[ =]('[^']*'|\S+)", r"\1 DATA", " ".join(command.split()))
