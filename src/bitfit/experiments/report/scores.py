"""The tables in the shape of the paper's: methods in rows, tasks in columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bitfit.experiments.report.differences import WAYS
from bitfit.experiments.report.paper import (
    printed_rates,
    printed_row,
    printed_rows,
    printed_score,
    task_title,
)
from bitfit.experiments.report.results import Line, Results, TaskColumn
from bitfit.experiments.report.table import (
    DAGGER,
    DASH,
    DOUBLE_DAGGER,
    SHARE,
    Cell,
    Column,
    Table,
    mean_column,
    none_if_nan,
    number,
    points,
    rate,
    rate_text,
    text,
)

MakeCell = Callable[[Line, TaskColumn], tuple[Cell, float]]
"""A cell, and its number for the average."""


def best_table(results: Results) -> Table | None:
    """Return the best score of each cell over its seeds, to set beside single printed numbers."""

    def cell(line: Line, column: TaskColumn) -> tuple[Cell, float]:
        found = results.summary("paper", line, column)
        printed = _printed(results, line, column)
        shown = Cell(points(found.best), none_if_nan(found.best), found.runs, printed)
        return shown, found.best

    notes = ["The best of the seeds at the chosen rate: a single best-on-dev number, as printed."]
    table = _wide(results, "best", "Best on dev", "paper", cell, notes)
    return None if table is None else _with_shares(results, table)


def _with_shares(results: Results, table: Table) -> Table:
    """Return the table of best scores as the paper's are: with the shares of the parameters.

    And with the paper's rows that no run of ours can be, printed numbers only.
    """
    keys = [column.key for column in table.columns]
    place = keys.index("seeds")

    def widened(
        row: Sequence[Cell], share: float | None, printed: float | None
    ) -> tuple[Cell, ...]:
        shown = DASH if share is None else f"{100 * share:.2f}"
        return (*row[:place], Cell(shown, share, (), printed, "{:.2f}".format), *row[place:])

    rows = []
    for line, row in zip(results.lines, table.rows, strict=True):
        printed = printed_row(results.paper, line.row, line.base)
        rows.append(widened(row, results.share(line), printed.percent if printed else None))
    others = [row for split in ("dev", "test") for row in printed_rows(results.paper, split)]
    others = [row for row in others if not row.can_be_ours]
    for other in others:
        scores = [Cell(printed=other.scores.get(c.key)) for c in results.columns]
        name = f"{other.name}, {other.base}, {other.split}"
        row = (text(name), *scores, *[Cell()] * (len(keys) - 1 - len(scores)))
        rows.append(widened(row, None, other.percent))
    if all(row[place].text == DASH and row[place].printed is None for row in rows):
        return table
    share = Column(SHARE, "% of the encoder")
    columns = (*table.columns[:place], share, *table.columns[place:])
    notes = ["% of the encoder: the parameters that are trained, without the head."]
    if others:
        sources = "; ".join(f"{row.name}, {row.split}: {row.source}" for row in others)
        notes.append(f"Printed only: {sources}.")
    return replace(
        table, columns=columns, rows=tuple(rows), notes=(*table.notes, *notes),
        printed_only=len(others),
    )  # fmt: skip


def mean_table(results: Results, way: str) -> Table | None:
    """Return mean ± standard deviation over the seeds under one protocol."""

    def cell(line: Line, column: TaskColumn) -> tuple[Cell, float]:
        found = results.summary(way, line, column)
        return found.cell(printed=_printed(results, line, column)), found.mean

    notes = [
        f"Mean ± standard deviation over the seeds. Protocol {way}: {WAYS[way]}.",
    ]
    if way == "split" and any(c.split != "dev" for c in results.columns):
        notes.append("MNLI's mismatched half chooses nothing: all of it reports.")
    return _wide(results, f"mean-{way}", f"Mean over the seeds, protocol {way}", way, cell, notes)


def _printed(results: Results, line: Line, column: TaskColumn) -> float | None:
    return printed_score(results.paper, line.row, column.key, line.base)


def _wide(
    results: Results, key: str, title: str, way: str, make: MakeCell, notes: Sequence[str]
) -> Table | None:
    whole = [c for c in results.columns if _is_whole(results, way, c)]
    rows = [_wide_row(results, way, line, make, whole) for line in results.lines]
    if not any(cell.text != DASH for row in rows for cell in row[1 : len(results.columns) + 1]):
        return None
    columns = [Column("row", "row", False), *(Column(c.key, c.title) for c in results.columns)]
    if len(results.columns) > 1:
        columns.append(Column("average", "average"))
    columns.append(Column("seeds", "seeds"))
    if results.failed:
        columns.append(Column("failed", "failed runs"))
    metrics = ", ".join(f"{c.title} {c.metric}" for c in results.columns)
    extra = [f"Metrics, times 100: {metrics}."]
    limits = ", ".join(f"{task_title(t)} {n:,}" for t, n in results.limits().items())
    if limits:
        extra.append(f"Trained on a part of the rows: {limits}.")
    if len(results.columns) > 1:
        left = [c.title for c in results.columns if c.split != "dev" and c not in whole]
        but = f" but {', '.join(left)}, which runs of an earlier version lack" if left else ""
        extra.append(f"average: the mean of the columns{but}, where none is missing.")
    extra += _mark_note(results, rows)
    base, where = _printed_base(results)
    if base:
        extra.append(
            f"In brackets (on the page marked 'paper'): the paper's {where}, {base}, on dev "
            "(anonymous ACL submission)."
        )
    return Table(
        key, title, tuple(columns), tuple(rows), (*notes, *extra), is_wide=True, printed_base=base
    )


def _is_whole(results: Results, way: str, column: TaskColumn) -> bool:
    """Whether every line that has runs of a column's task has scores there."""
    lines = [line for line in results.lines if results.choices(way, line, column.task)]
    return all(results.summary(way, line, column).scores for line in lines)


def _wide_row(
    results: Results, way: str, line: Line, make: MakeCell, whole: Sequence[TaskColumn]
) -> tuple[Cell, ...]:
    made = [make(line, column) for column in results.columns]
    made = [
        (_marked(results, line, column, cell), value)
        for column, (cell, value) in zip(results.columns, made, strict=True)
    ]
    cells = [text(results.label(line)), *(cell for cell, _ in made)]
    if len(results.columns) > 1:
        # Runs of earlier versions may lack MNLI's mismatched half under split: no average has it.
        average = mean_column([
            value for column, (_, value) in zip(results.columns, made, strict=True)
            if column.split == "dev" or column in whole
        ])  # fmt: skip
        value = none_if_nan(average)
        runs = () if value is None else (run for cell, _ in made for run in cell.runs)
        cells.append(Cell(points(average), value, tuple(dict.fromkeys(runs))))
    seeds = sorted({len(results.choices(way, line, task)) for task in results.tasks} - {0})
    span = [str(n) for n in (seeds if len(seeds) < 2 else (seeds[0], seeds[-1]))]
    cells.append(Cell("–".join(span) or DASH, seeds))
    if results.failed:
        cells.append(number(sum(results.failures(line, task) for task in results.tasks)))
    return tuple(cells)


def _marked(results: Results, line: Line, column: TaskColumn, cell: Cell) -> Cell:
    tried, wanted = results.search_of(line, column.task)
    mixed = DAGGER if len(results.conditions(cell.runs)) > 1 else ""
    unfinished = DOUBLE_DAGGER if cell.runs and tried < wanted else ""
    return replace(cell, mark=mixed + unfinished)


def _mark_note(results: Results, rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return what the marks say, where a cell has them."""
    mixed = [cell for row in rows for cell in row if DAGGER in cell.mark]
    notes = []
    if mixed:
        conditions = results.conditions(run for cell in mixed for run in cell.runs)
        notes.append(
            f"{DAGGER}: the seeds of this cell were not all made under the same conditions, but in "
            f"{' and '.join(conditions)}."
        )
    if any(DOUBLE_DAGGER in cell.mark for row in rows for cell in row):
        notes.append(
            f"{DOUBLE_DAGGER}: the search over the rates is not finished, so another may be better."
        )
    return notes


def _printed_base(results: Results) -> tuple[str, str]:
    """Return the bases of the printed rows that stand beside ours, and where they stand."""
    found = (printed_row(results.paper, line.row, line.base) for line in results.lines)
    rows = [row for row in found if row]
    bases, sources = dict.fromkeys(r.base for r in rows), dict.fromkeys(r.source for r in rows)
    return ", ".join(bases), " and ".join(sources)


def rate_table(results: Results) -> Table | None:
    """Return the chosen rates, with those of the paper's Table 6 beside."""
    columns = [c for c in results.columns if c.split == "dev"]
    lines = [line for line in results.lines if any(results.runs(line, t) for t in results.tasks)]
    rows = tuple(
        (text(results.label(line)), *(_rate_cell(results, line, c.task) for c in columns))
        for line in lines
    )
    if not rows:
        return None
    notes = [
        "The rate with the best mean dev score over the seeds that every rate was run with; of "
        "equal ones the smallest (protocol paper). After a slash: how many were tried. The table "
        "of every score has the rates of the protocol split.",
    ]
    base = ""
    if any(cell.printed is not None for row in rows for cell in row):
        bases = (_printed_rates(results, line)[0] for line in lines)
        base = ", ".join(dict.fromkeys(found for found in bases if found))
        notes.append(
            f"In brackets (on the page marked 'paper'): the paper's Table 6, {base} "
            "(anonymous ACL submission)."
        )
    heads = (Column("row", "row", False), *(Column(c.key, c.title) for c in columns))
    return Table(
        "rates", "Best learning rates", heads, rows, tuple(notes), is_wide=True, printed_base=base
    )


def _printed_rates(results: Results, line: Line) -> tuple[str, Mapping[str, float]]:
    """Return the printed rates of the base whose printed scores stand beside a line's."""
    if not results.paper:
        return "", {}
    beside = printed_row(results.paper, line.row, line.base)
    return printed_rates(line.row, beside.base if beside else line.base)


def _rate_cell(results: Results, line: Line, task: str) -> Cell:
    choices = results.choices("paper", line, task)
    if not choices:
        return Cell()
    found = choices[0].record["config"]["learning_rate"]
    tried = len(results.by_rate(line, task))
    return Cell(
        rate(found).text + (f" / {tried}" if tried > 1 else ""),
        {"rate": found, "tried": tried},
        tuple(c.record["id"] for c in choices),
        _printed_rates(results, line)[1].get(task),
        rate_text,
    )
