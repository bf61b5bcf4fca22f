"""Each row against the reference row, task by task, with an interval and a plain word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitfit.experiments import protocol
from bitfit.experiments.report.paper import task_title
from bitfit.experiments.report.results import Line, Results
from bitfit.experiments.report.scorers import Floats, Scorer, make_scorer
from bitfit.experiments.report.statistics import (
    RESAMPLES,
    Difference,
    bootstrap_difference,
    resample,
    seeds_difference,
    standard_error,
)
from bitfit.experiments.report.table import (
    DASH,
    Cell,
    Column,
    Table,
    none_if_nan,
    number,
    points,
    rate,
    score,
    text,
)

WAYS = {
    "paper": "the best epoch and rate on dev are those reported on dev, as in the paper's tables",
    "split": "one half of dev chooses epoch and rate, the other half reports",
}
"""What each protocol does, in words."""


class Draws:
    """The headline score of every chosen run in the resamples of its dev rows, drawn when asked.

    Runs with the same dev rows are scored in the same resamples.
    """

    def __init__(self, results: Results, resamples: int = RESAMPLES) -> None:
        self.results, self.resamples = results, resamples
        self._made: dict[tuple[str, str], dict[str, Floats]] = {}

    def of_task(self, way: str, task: str) -> Mapping[str, Floats]:
        """Return run id -> scores ``(resamples,)`` of each chosen run that has predictions."""
        if (way, task) not in self._made:
            self._made[way, task] = self._draw(way, task)
        return self._made[way, task]

    def standard_error(self, way: str, task: str, runs: Sequence[str]) -> float:
        """Return the standard error of one run's score over the examples, the runs' mean."""
        draws = self.of_task(way, task)
        errors = [standard_error(draws[run]) for run in runs if run in draws]
        return float(np.mean(errors)) if errors else float("nan")

    def _draw(self, way: str, task: str) -> dict[str, Floats]:
        groups: dict[str, list[protocol.Choice]] = {}
        for line in self.results.lines:
            for choice in self.results.choices(way, line, task):
                groups.setdefault(dev_rows(choice.record), []).append(choice)
        found: dict[str, Floats] = {}
        for choices in groups.values():
            answers = self.results.store.answers(choices[0].record)
            if answers:
                found |= self._draw_group(way, choices, answers)
        return found

    def _draw_group(
        self, way: str, choices: Sequence[protocol.Choice], answers: Sequence[Any]
    ) -> dict[str, Floats]:
        """Return the draws of runs that share their dev rows."""
        places = protocol.halves(len(answers))[1] if way == "split" else np.arange(len(answers))
        right = [answers[i] for i in places]
        scorers: dict[str, Scorer] = {}
        for choice in choices:
            predictions = self.results.store.predictions(choice.record)
            if predictions is None:
                continue
            epoch = predictions["dev"][choice.epoch - 1]
            task = protocol.task_of(choice.record)
            predicted = [epoch[i] for i in places]
            scorers[choice.record["id"]] = make_scorer(task, task.metric, predicted, right)
        draws = resample(list(scorers.values()), len(places), self.resamples)
        return dict(zip(scorers, draws, strict=True))


@dataclass(frozen=True)
class Comparison:
    """A line beside another on a task."""

    line: Line
    other: Line
    task: str
    difference: Difference
    runs: tuple[str, ...]
    """Those of both lines."""


def dev_rows(record: Mapping[str, Any]) -> str:
    """Return what tells the dev rows of a run from others."""
    return str((record.get("data") or {}).get("dev"))


def compare(draws: Draws, way: str, pairs: Sequence[tuple[Line, Line, str]]) -> list[Comparison]:
    """Return the differences of all ``pairs`` ``(line, other, task)`` for which both have runs.

    They are one family: the interval of each is corrected for how many there are.
    """
    results = draws.results
    sides = [
        (line, other, task, results.choices(way, line, task), results.choices(way, other, task))
        for line, other, task in pairs
    ]
    sides = [side for side in sides if side[3] and side[4]]
    return [
        Comparison(
            line, other, task,
            _difference(draws.of_task(way, task), ours, theirs, len(sides)),
            tuple(c.record["id"] for c in (*ours, *theirs)),
        )
        for line, other, task, ours, theirs in sides
    ]  # fmt: skip


def to_reference(draws: Draws, way: str) -> list[Comparison]:
    """Return every line against its reference line on every task."""
    results = draws.results
    pairs = [(line, results.reference(line)) for line in results.lines]
    return compare(
        draws, way, [(a, b, task) for a, b in pairs if b is not None for task in results.tasks]
    )


def _difference(
    draws: Mapping[str, Floats],
    ours: Sequence[protocol.Choice],
    theirs: Sequence[protocol.Choice],
    comparisons: int,
) -> Difference:
    runs = [*ours, *theirs]
    shared = len({dev_rows(c.record) for c in runs}) == 1
    scores = [{_seed(c): c.score for c in side} for side in (ours, theirs)]
    if not shared or any(c.record["id"] not in draws for c in runs):
        return seeds_difference(*scores, comparisons=comparisons)
    row, reference = ({_seed(c): draws[c.record["id"]] for c in side} for side in (ours, theirs))
    return bootstrap_difference(row, reference, *scores, comparisons=comparisons)


def _seed(choice: protocol.Choice) -> int:
    return int(choice.record["config"]["seed"])


# ------------------------------------------------------------------ tables

COLUMNS = (
    Column("difference", "difference"),
    Column("interval", "95 % interval"),
    Column("word", "in words", False),
    Column("seeds", "seeds"),
    Column("basis", "drawn again", False),
)


def difference_cells(comparison: Comparison) -> list[Cell]:
    """Return the cells of :data:`COLUMNS`."""
    found = comparison.difference
    low, high = none_if_nan(found.low), none_if_nan(found.high)
    known = low is not None and high is not None
    interval = f"{points(low, signed=True)} to {points(high, signed=True)}" if known else DASH
    value = Cell(points(found.value, signed=True), none_if_nan(found.value), comparison.runs)
    seeds = Cell(f"{found.seeds}{'' if found.paired else ' (not paired)'}", found.seeds)
    return [
        value,
        Cell(interval, {"low": low, "high": high} if known else None),
        text(found.word),
        seeds,
        text(found.basis or DASH),
    ]


def correction_note(comparisons: Sequence[Comparison], resamples: int) -> str:
    """Return how the intervals were made and what they were corrected for."""
    count = len(comparisons)
    return (
        f"The intervals hold together at 95 %: corrected for {count} comparison"
        f"{'s' if count != 1 else ''} (Bonferroni), {resamples:,} resamples. 'ahead', 'behind': "
        "zero is outside. 'one seed only': zero is outside, but another seed may turn it. "
        "'too few seeds': zero is inside only because so few seeds do not say how far they spread. "
        "'not known': no predictions and fewer than two seeds, or an undefined score."
    )


def difference_table(draws: Draws, way: str) -> Table | None:
    """Return the differences to the reference row; None where there is nothing to compare."""
    results = draws.results
    found = to_reference(draws, way)
    if not found:
        return None
    many = any(c.difference.basis == "seeds" for c in found)
    notes = [
        f"Protocol {way}: {WAYS[way]}.",
        f"Mean score of a row less that of {results.experiment.get('reference_row')}, in points.",
        correction_note(found, draws.resamples),
    ]
    if many:
        notes.append(
            "'seeds': predictions were missing or the dev rows differ, so this is Student's t over "
            "the seeds, and says nothing on other examples."
        )
    rows = [
        (text(results.label(c.line)), text(task_title(c.task)), *difference_cells(c)) for c in found
    ]
    return Table(
        "differences" if way == "paper" else f"differences-{way}",
        f"Differences to the reference row, protocol {way}",
        (Column("row", "row", False), Column("task", "task", False), *COLUMNS),
        tuple(rows), tuple(notes), heads=2,
    )  # fmt: skip


def detail_table(draws: Draws) -> Table | None:
    """Return one row per cell with everything on its scores and the runs that it is made of."""
    results = draws.results
    rows = [
        row
        for line in results.lines
        for task in results.tasks
        if (row := _detail(draws, line, task))
    ]
    if not rows:
        return None
    columns = (
        Column("row", "row", False), Column("task", "task", False),
        Column("metric", "metric", False), Column("rate", "rate"), Column("seeds", "seeds"),
        Column("best", "best"), Column("mean", "mean"), Column("sd", "sd"),
        Column("error", "error of one run"), Column("train_rows", "training rows"),
        Column("dev_rows", "dev rows"),
        Column("split_rate", "rate (split)"), Column("split_mean", "mean (split)"),
        Column("split_sd", "sd (split)"), Column("failed", "failed"),
        Column("runs", "runs", False),
    )  # fmt: skip
    notes = (
        "best, mean and standard deviation (sd) over the seeds, at the chosen rate.",
        "error of one run: how far one run's score moves with the examples that happen to be in "
        "dev, by a bootstrap; the seeds come on top.",
    )
    return Table("scores", "Every score with its runs", columns, tuple(rows), notes, heads=2)


def _detail(draws: Draws, line: Line, task: str) -> tuple[Cell, ...] | None:
    results = draws.results
    column = next(c for c in results.columns if c.key == task)
    paper, split = (results.summary(way, line, column) for way in ("paper", "split"))
    failed = results.failures(line, task)
    if not (paper.scores or failed):
        return None
    choices = results.choices("paper", line, task)
    return (
        text(results.label(line)),
        text(task_title(task)),
        text(column.metric),
        _rate(results, "paper", line, task),
        number(len(paper.scores)),
        score(paper.best),
        Cell(paper.mean_alone(), none_if_nan(paper.mean), paper.runs),
        score(paper.spread),
        score(draws.standard_error("paper", task, paper.runs)),
        _row_count(choices, "train"),
        _row_count(choices, "dev"),
        _rate(results, "split", line, task),
        Cell(split.mean_alone(), none_if_nan(split.mean), split.runs),
        score(split.spread),
        number(failed),
        Cell(", ".join(paper.runs) or DASH, list(paper.runs), paper.runs),
    )


def _row_count(choices: Sequence[protocol.Choice], split: str) -> Cell:
    counts = sorted({c.record["rows"][split] for c in choices})
    return Cell(" / ".join(f"{n:,}" for n in counts) or DASH, counts)


def _rate(results: Results, way: str, line: Line, task: str) -> Cell:
    choices = results.choices(way, line, task)
    return rate(choices[0].record["config"]["learning_rate"] if choices else None)
