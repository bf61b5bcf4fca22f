"""The way back: every run with its record and command, and the failures with their errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitfit.experiments.report.paper import task_title
from bitfit.experiments.report.results import Results, shown_command, to_float
from bitfit.experiments.report.table import Cell, Column, Table, number, rate, score, text


def run_table(results: Results) -> Table | None:
    """Return one row per record, finished or failed, in the order of the experiment."""
    if not results.records:
        return None
    columns = (Column("id", "run", False), Column("state", "state", False), *_NAMES,
               Column("epoch", "best epoch"), Column("score", "dev"), Column("train", "train"),
               Column("last", "dev, last epoch"),
               Column("command", "command that repeats it alone", False))  # fmt: skip
    rows = [
        (
            _id(record), text(record["state"]), *_names(results, record),
            number(record.get("best_epoch")), _score(record, "scores"),
            _score(record, "train_scores"), _score(record, "last"),
            text(shown_command(record.get("command") or "")),
        )
        for record in results.records
    ]  # fmt: skip
    notes = ("Each run's record is runs/ID.json, its predictions are predictions/ID.json.gz. DATA "
             "stands for the folder of the data.",)  # fmt: skip
    return Table("runs", "Every run", columns, tuple(rows), notes)


def failure_table(results: Results) -> Table | None:
    """Return the failed runs with their errors; None without any."""
    if not results.failed:
        return None
    rows = [
        (_id(record), *_names(results, record), text(record.get("error") or "no message"))
        for record in results.failed
    ]
    columns = (Column("id", "run", False), *_NAMES, Column("error", "error", False))
    return Table("failures", "Failed runs", columns, tuple(rows))


_NAMES = (Column("row", "row", False), Column("task", "task", False), Column("rate", "rate"),
          Column("seed", "seed"))  # fmt: skip


def _names(results: Results, record: Mapping[str, Any]) -> tuple[Cell, ...]:
    return (
        text(results.label(results.line_of(record))),
        text(task_title(record["task"]["name"])),
        rate(record["config"].get("learning_rate")),
        Cell(str(record["config"].get("seed")), record["config"].get("seed")),
    )


def _id(record: Mapping[str, Any]) -> Cell:
    return Cell(record["id"], record["id"], (record["id"],))


def _score(record: Mapping[str, Any], part: str) -> Cell:
    scores = record.get(part) or {}
    return score(to_float(scores.get(record.get("metric"))))
