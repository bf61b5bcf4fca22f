"""What moved: the change of each bias term by layer, and two predictions of the theory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitfit.experiments.report.differences import (
    COLUMNS,
    Comparison,
    Draws,
    compare,
    correction_note,
    difference_cells,
)
from bitfit.experiments.report.paper import task_title
from bitfit.experiments.report.results import Line, Results
from bitfit.experiments.report.table import Cell, Column, Table, number, text
from bitfit.plots import change_table
from bitfit.terms import EIGHT_TERMS, SYMBOLS

PREDICTIONS = {
    "key": "b_k changes nothing",
    "value": "b_v is absorbed by b_m1",
}
"""Term -> what the theory says of leaving it out."""


def mean_change(results: Results, line: Line, task: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the change of each bias vector, the mean over the chosen runs, and their ids.

    In the form that :func:`bitfit.plots.change_table` takes; empty where no bias was trained.
    """
    runs = [c.record for c in results.choices("paper", line, task) if c.record.get("change")]
    values: dict[tuple[str, int | None], list[float]] = {}
    for run in runs:
        for entry in run["change"]:
            values.setdefault((entry["term"], entry["layer"]), []).append(entry["mean_abs"])
    changes = [
        {"term": term, "layer": layer, "mean_abs": float(np.mean(found))}
        for (term, layer), found in values.items()
    ]
    return changes, [run["id"] for run in runs]


def bias_change_table(results: Results) -> Table | None:
    """Return term x layer of every cell that trained biases, the largest change on top."""
    found = []
    for line in results.lines:
        for task in results.tasks:
            changes, runs = mean_change(results, line, task)
            found += [(line, task, tuple(runs), entry) for entry in change_table(changes)]
    if not found:
        return None
    layers = sorted({x for *_, entry in found for x in entry["layers"] if x is not None})
    rows = [
        (
            text(results.label(line)), text(task_title(task)), text(entry["symbol"]),
            _change(entry["mean"], runs), *(_change(entry["layers"].get(x)) for x in layers),
        )
        for line, task, runs, entry in found
    ]  # fmt: skip
    columns = (Column("row", "row", False), Column("task", "task", False),
               Column("term", "term", False), Column("average", "average"),
               *(Column(f"layer_{x}", f"layer {x}") for x in layers))  # fmt: skip
    notes = (
        "Mean absolute change of a bias vector's values, in thousandths, mean over the seeds at "
        "the chosen rate (the paper's Figure 1). JSON has the values as they are.",
        *([note] if (note := rounding_note(results)) else []),
    )
    return Table("change", "How far each bias moved", columns, tuple(rows), notes, heads=3)


def rounding_note(results: Results) -> str:
    """Return what is to be said of b_k where it was trained with rounded products, else nothing."""
    found = {
        str((record.get("environment") or {}).get("dtype", "fp32"))
        for record in results.done
        if any(entry["term"] == "key" for entry in record.get("change") or ())
    }
    if not (rounded := sorted(found - {"fp32"})):
        return ""
    return (
        f"Computed in {' and '.join(rounded)}: its rounding gives b_k a gradient where exact "
        "arithmetic has none, and Adam makes whole steps of it, so b_k moves here. What the scores "
        "are does not depend on b_k; in fp32 it stays."
    )


def _change(value: float | None, runs: tuple[str, ...] = ()) -> Cell:
    cell = number(None if value is None else 1000 * value, ",.2f")
    return Cell(cell.text, value, runs)


# ------------------------------------------------------------------ theory


def trained_terms(record: Mapping[str, Any]) -> frozenset[str]:
    """Return the bias terms that a run trained in all layers, empty where that is not known.

    By its change where it has one, else by the names in its configuration. ``all`` leaves out what
    is inert on the base and so is known by the change only.
    """
    config = record["config"]
    names = [item.strip() for item in str(config.get("terms") or "").split(",")]
    if config.get("method") != "bitfit" or any("@" in n or ":" in n for n in names):
        return frozenset()
    if record.get("change"):
        return frozenset(entry["term"] for entry in record["change"])
    terms = {symbol: term for term, symbol in SYMBOLS.items()}
    found = frozenset(terms.get(name, name) for name in names)
    return found if found <= set(EIGHT_TERMS) else frozenset()


def leave_one_out(results: Results) -> list[tuple[str, Line, Line]]:
    """Return ``(term, line without it, line with it)`` for each term of :data:`PREDICTIONS`.

    Of all that differ in this term alone, those with the most terms. Where none does, b_v is
    looked at in rows that differ in b_k, too, as that changes nothing.
    """
    terms: dict[Line, frozenset[str]] = {}
    for record in results.done:
        line = results.line_of(record)
        terms.setdefault(line, trained_terms(record))
    found = []
    for term in PREDICTIONS:
        pairs = [
            (term, less, more)
            for more in results.lines
            for less in results.lines
            if (more.base, more.train_rows) == (less.base, less.train_rows)
            and _differ_in(term, terms.get(less), terms.get(more))
        ]
        exact = [pair for pair in pairs if terms[pair[2]] == terms[pair[1]] | {term}]
        pairs = exact or pairs
        most = max((len(terms[less] | terms[more]) for _, less, more in pairs), default=0)
        found += [pair for pair in pairs if len(terms[pair[1]] | terms[pair[2]]) == most]
    return found


def _differ_in(term: str, less: frozenset[str] | None, more: frozenset[str] | None) -> bool:
    if not less or not more or term in less or term not in more:
        return False
    rest = {term, "key"}
    return less - rest == more - rest and (term == "key" or "attention_output" in less)


def theory_table(draws: Draws) -> Table | None:
    """Return the checks of :data:`PREDICTIONS`; None where the grid has no rows for them."""
    results = draws.results
    pairs = [
        (term, less, more, task)
        for term, less, more in leave_one_out(results)
        for task in results.tasks
    ]
    found = compare(draws, "paper", [(less, more, task) for _, less, more, task in pairs])
    if not found:
        return None
    terms = {(less, more): term for term, less, more, _ in pairs}
    rows = [_theory_row(results, terms[c.line, c.other], c) for c in found]
    columns = (Column("prediction", "prediction", False), Column("without", "without it", False),
               Column("with", "with it", False), Column("task", "task", False), *COLUMNS,
               Column("verdict", "the prediction", False))  # fmt: skip
    notes = (
        "The mean score without the term less that with it, protocol paper.",
        "b_k adds the same to every score that a query gives, and softmax does not see it. "
        "Attention weights sum to one, so b_v reaches the next layer only as W_o b_v + b_m1; "
        "exactly so only without dropout on the attention weights.",
        "An interval around zero does not prove that nothing changes: the largest difference that "
        "the data allow is its farther end.",
        _dropout_note(results),
        correction_note(found, draws.resamples),
    )
    return Table("theory", "Two predictions of the theory", columns, tuple(rows), notes, heads=4)


def _dropout_note(results: Results) -> str:
    found = {record["config"].get("attention_dropout") for record in results.done}
    if found == {0.0}:
        return "In these runs the attention weights had no dropout."
    if 0.0 in found:
        return "In some of these runs the attention weights had no dropout, in others they had."
    return "In these runs the attention weights had the dropout of the base."


def _theory_row(results: Results, term: str, comparison: Comparison) -> tuple[Cell, ...]:
    return (
        text(PREDICTIONS[term]),
        text(results.label(comparison.line)),
        text(results.label(comparison.other)),
        text(task_title(comparison.task)),
        *difference_cells(comparison),
        text(_verdict(comparison)),
    )


def _verdict(comparison: Comparison) -> str:
    word = comparison.difference.word
    if word in ("ahead", "behind"):
        return "contradicted"
    return "not contradicted" if word == "within noise" else "not decided"


def heat_maps(
    results: Results,
) -> Sequence[tuple[Line, str, list[dict[str, Any]]]]:
    """Return the cells to draw: the reference row, else the first row that trained biases.

    Per base, with the most training rows.
    """
    found = []
    for base in results.bases:
        lines = [x for x in results.lines if x.base == base]
        name = results.experiment.get("reference_row")
        lines.sort(key=lambda x: (x.row != name, -(x.train_rows or float("inf"))))
        for task in results.tasks:
            maps = ((line, task, mean_change(results, line, task)[0]) for line in lines)
            first = next((entry for entry in maps if entry[2]), None)
            found += [first] if first else []
    return found
