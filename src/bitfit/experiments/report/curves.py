"""Learning curves: scores by the number of training rows, and where two methods cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bitfit.experiments.report.paper import task_title
from bitfit.experiments.report.results import Results, dev_score
from bitfit.experiments.report.table import Cell, Column, Summary, Table, number, text


@dataclass(frozen=True)
class Point:
    """One size of one curve."""

    rows: int
    """Training rows that were really used."""
    scores: Summary


@dataclass(frozen=True)
class Curve:
    """The scores of a row of the grid on a base and task by the number of training rows."""

    row: str
    base: str
    task: str
    metric: str
    points: tuple[Point, ...]
    """By rising number of rows."""


@dataclass(frozen=True)
class Crossing:
    """Where the mean of a curve meets that of the reference row."""

    curve: Curve
    other: Curve
    rows: tuple[float, ...]
    """Training rows at each crossing, interpolated in their logarithm."""
    sizes: tuple[int, ...]
    """The sizes that both have."""
    ahead: str
    """The row that is ahead at the smallest size."""


def learning_curves(results: Results) -> list[Curve]:
    """Return a curve per base, task, metric and row where there is more than one size."""
    names = list(dict.fromkeys((line.base, line.row) for line in results.lines))
    curves = [
        _curve(results, row, base, task, metric)
        for task in results.tasks
        for metric in _metrics(results, task)
        for base, row in names
    ]
    return [curve for curve in curves if len(curve.points) > 1]


def _metrics(results: Results, task: str) -> list[str]:
    record = next(r for r in results.records if r["task"]["name"] == task)
    return list(record["task"]["metrics"])


def _curve(results: Results, row: str, base: str, task: str, metric: str) -> Curve:
    points = []
    for line in results.lines:
        choices = (
            results.choices("paper", line, task) if (line.row, line.base) == (row, base) else []
        )
        if choices:
            scores = tuple(dev_score(c, metric) for c in choices)
            found = Summary(scores, tuple(c.record["id"] for c in choices))
            points.append(Point(choices[0].record["rows"]["train"], found))
    return Curve(row, base, task, metric, tuple(sorted(points, key=lambda p: p.rows)))


def crossings(results: Results, curves: Sequence[Curve]) -> list[Crossing]:
    """Return where each curve meets that of the reference row; without one, of the first row."""
    found = []
    for base, task, metric in dict.fromkeys((c.base, c.task, c.metric) for c in curves):
        group = [c for c in curves if (c.base, c.task, c.metric) == (base, task, metric)]
        name = results.experiment.get("reference_row")
        other = next((c for c in group if c.row == name), group[0])
        found += [_cross(curve, other) for curve in group if curve is not other]
    return [crossing for crossing in found if len(crossing.sizes) > 1]


def _cross(curve: Curve, other: Curve) -> Crossing:
    ours = {p.rows: p.scores.mean for p in curve.points}
    theirs = {p.rows: p.scores.mean for p in other.points}
    sizes = [n for n in ours if n in theirs and math.isfinite(ours[n] + theirs[n])]
    gaps = [ours[n] - theirs[n] for n in sizes]
    first = next((gap for gap in gaps if gap), 0.0)
    ahead = curve.row if first > 0 else other.row if first < 0 else ""
    return Crossing(curve, other, tuple(zeros(sizes, gaps)), tuple(sizes), ahead)


def zeros(sizes: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Return where a gap changes its sign, linear between sizes in the logarithm of the size.

    A gap of exactly zero between two signs is a crossing at that size.

    Example:
        >>> zeros([100, 10_000], [0.1, -0.1])
        [1000.0...]
    """
    places = []
    known = [(n, gap) for n, gap in zip(sizes, gaps, strict=True) if gap != 0.0]
    for (left, a), (right, b) in pairwise(known):
        if a * b < 0:
            between = [n for n in sizes if left < n < right]
            share = a / (a - b)
            at = math.log(left) + share * (math.log(right) - math.log(left))
            places.append(float(between[0]) if between else math.exp(at))
    return places


# ------------------------------------------------------------------ tables


def curve_table(results: Results) -> Table | None:
    """Return the numbers of the learning curves; None without any."""
    curves = learning_curves(results)
    if not curves:
        return None
    rows = [
        (
            text(_name(results, curve)), text(task_title(curve.task)), text(curve.metric),
            number(point.rows), point.scores.cell(), number(len(point.scores.scores)),
        )
        for curve in curves
        for point in curve.points
    ]  # fmt: skip
    columns = (Column("row", "row", False), Column("task", "task", False),
               Column("metric", "metric", False), Column("train_rows", "training rows"),
               Column("score", "dev"), Column("seeds", "seeds"))  # fmt: skip
    notes = (
        "Mean ± standard deviation over the seeds, at the epoch and rate that the headline metric "
        "chose on dev (protocol paper).",
    )
    return Table("curves", "Learning curves", columns, tuple(rows), notes, heads=4)


def crossing_table(results: Results) -> Table | None:
    """Return where the curves cross; None without two curves."""
    found = crossings(results, learning_curves(results))
    if not found:
        return None
    rows = []
    for cross in found:
        shown = ", ".join(f"{n:,.0f}" for n in cross.rows) or "no crossing in the range"
        rows.append((
            text(_name(results, cross.curve)), text(_name(results, cross.other)),
            text(task_title(cross.curve.task)), text(cross.curve.metric),
            Cell(f"{cross.sizes[0]:,} to {cross.sizes[-1]:,}", list(cross.sizes)),
            text(cross.ahead or "neither"), Cell(shown, list(cross.rows)),
        ))  # fmt: skip
    columns = (Column("row", "row", False), Column("reference", "against", False),
               Column("task", "task", False), Column("metric", "metric", False),
               Column("range", "training rows"), Column("ahead", "ahead at the smallest", False),
               Column("crossing", "crossing at"))  # fmt: skip
    notes = (
        "Where the two mean curves meet, linear between the sizes in the logarithm of the number "
        "of rows. Spread over the seeds moves it: see the bands of the figure.",
    )
    return Table("crossings", "Where the learning curves cross", columns, tuple(rows), notes, 4)


def _name(results: Results, curve: Curve) -> str:
    return curve.row if len(results.bases) == 1 else f"{curve.row}, {results.bases[curve.base]}"
