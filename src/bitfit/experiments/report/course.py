"""Tables on how training went: generalization gap, convergence, stability, cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from bitfit.experiments.protocol import Choice
from bitfit.experiments.report.paper import task_title
from bitfit.experiments.report.results import Line, Results, to_float
from bitfit.experiments.report.table import (
    DASH,
    Cell,
    Column,
    Summary,
    Table,
    number,
    rate,
    score,
    text,
)

_CORRELATIONS = ("spearman", "pearson")
_NAMES = (Column("row", "row", False), Column("task", "task", False))


def gap_table(results: Results) -> Table | None:
    """Return the generalization gap of the chosen runs: train score less dev score."""
    rows = []
    for line in results.lines:
        for task in results.tasks:
            runs = [c for c in results.choices("paper", line, task) if _has_train(c)]
            if runs:
                rows.append(_gap_row(results, line, task, runs))
    columns = (*_NAMES, Column("metric", "metric", False), Column("train", "train"),
               Column("dev", "dev"), Column("gap", "gap"), Column("seeds", "seeds"))  # fmt: skip
    notes = (
        "Of the runs of the protocol paper, at their best epoch, dropout off: mean ± standard "
        "deviation over the seeds. gap: train less dev, in points.",
    )
    return _table("gap", "Generalization gap", columns, rows, notes, 2)


def _has_train(choice: Choice) -> bool:
    return bool(choice.record.get("train_scores"))


def _gap_row(results: Results, line: Line, task: str, runs: Sequence[Choice]) -> tuple[Cell, ...]:
    metric = results.metric(task)
    ids = tuple(c.record["id"] for c in runs)
    train = [to_float(c.record["train_scores"].get(metric)) for c in runs]
    dev = [to_float(c.record["scores"].get(metric)) for c in runs]
    gap = Summary(tuple(t - d for t, d in zip(train, dev, strict=True)), ids)
    return (
        text(results.label(line)),
        text(task_title(task)),
        text(metric),
        Summary(tuple(train), ids).cell(),
        Summary(tuple(dev), ids).cell(),
        gap.cell(signed=True),
        number(len(runs)),
    )


def convergence_table(results: Results) -> Table | None:
    """Return the epochs to the best dev score for each rate (the paper's A.2)."""
    rows = []
    for line, task, found, runs in _rates(results):
        metric = results.metric(task)
        epochs = [float(_epochs_to_best(run, metric)) for run in runs]
        ids = tuple(run["id"] for run in runs)
        first = [to_float(run["history"][0]["dev"].get(metric)) for run in runs]
        rows.append((
            text(results.label(line)), text(task_title(task)), rate(found),
            Cell(_plain_mean(epochs), sum(epochs) / len(epochs), ids),
            Cell(_span(len(run["history"]) for run in runs), [len(r["history"]) for r in runs]),
            Summary(tuple(first), ids).cell(), _best(runs, metric).cell(), number(len(runs)),
        ))  # fmt: skip
    columns = (*_NAMES, Column("rate", "rate"), Column("epochs", "epochs to the best"),
               Column("run", "epochs run"), Column("first", "dev after epoch 1"),
               Column("best", "dev at the best"), Column("seeds", "seeds"))  # fmt: skip
    notes = (
        "epochs to the best: the first epoch with the best dev score (the one that is kept is, of "
        "equals, the last), mean ± standard deviation over the seeds. Where it is the last that "
        "was run, more epochs may help.",
    )
    return _table("convergence", "Convergence: epochs to the best dev score", columns, rows, notes)


def _epochs_to_best(run: Mapping[str, Any], metric: str) -> int:
    """Return the first epoch, from 1, with the best score of any."""
    scores = [to_float(epoch["dev"].get(metric)) for epoch in run["history"]]
    return 1 + scores.index(scores[run["best_epoch"] - 1])


def stability_table(results: Results) -> Table | None:
    """Return the spread over seeds and the share of degenerate runs of each rate."""
    rows = []
    for line, task, found, runs in _rates(results):
        scores = _best(runs, results.metric(task))
        bad = sum(is_degenerate(run) for run in runs)
        rows.append((
            text(results.label(line)), text(task_title(task)), rate(found), number(len(runs)),
            Cell(scores.mean_alone(), scores.cell().value, scores.runs),
            score(scores.spread), score(scores.least), score(scores.best),
            Cell(f"{bad} of {len(runs)} ({100 * bad / len(runs):.0f} %)", bad / len(runs)),
            number(results.failures(line, task, found)),
        ))  # fmt: skip
    columns = (*_NAMES, Column("rate", "rate"), Column("seeds", "seeds"), Column("mean", "mean"),
               Column("sd", "sd"), Column("least", "min"), Column("best", "max"),
               Column("degenerate", "degenerate"), Column("failed", "failed"))  # fmt: skip
    notes = (
        "Dev score of the best epoch. degenerate: at or below what always saying the most frequent "
        "answer gives (for binary F1: always the class that it counts; for a correlation: 0), or "
        "not defined. failed: "
        "ended with an error, such as a loss that is no number; counted beside, not in the scores.",
    )
    return _table("stability", "Stability over the seeds", columns, rows, notes)


def is_degenerate(record: Mapping[str, Any]) -> bool:
    """Say whether a run learned nothing: its score is undefined or not above the majority's."""
    metric = record["metric"]
    found = to_float(record["scores"].get(metric))
    usual = to_float((record.get("majority") or {}).get(metric))
    if metric in _CORRELATIONS and math.isnan(usual):
        usual = 0.0  # that of one answer for all is not defined; what says nothing has none
    return math.isnan(found) or (math.isfinite(usual) and found <= usual)


def cost_table(results: Results) -> Table | None:
    """Return what the runs of each cell cost: time, memory, bytes, trained values.

    Those of each machine by themselves, where the experiment was on several.
    """
    several = len({_machine(r) for r in results.done if r.get("cost")}) > 1
    rows = []
    for line in results.lines:
        for task in results.tasks:
            machines: dict[str, list[Mapping[str, Any]]] = {}
            for record in results.runs(line, task):
                if record.get("cost"):
                    machines.setdefault(_machine(record), []).append(record)
            for machine, runs in machines.items():
                names = text(results.label(line)), text(task_title(task))
                where = (text(machine),) if several else ()
                rows.append((*names, *where, *_cost(runs)))
    heads = (*_NAMES, Column("machine", "on", False)) if several else _NAMES
    columns = (*heads, Column("train_seconds", "seconds of training"),
               Column("tokens_per_second", "tokens/s"), Column("peak_memory_mb", "peak MB"),
               Column("task_bytes", "bytes per task"), Column("encoder", "trained, encoder"),
               Column("head", "trained, head"), Column("lanes", "lanes"),
               Column("runs", "runs"))  # fmt: skip
    notes = (
        "Medians over the runs of a cell at every rate. peak: memory beyond what the process held "
        "before, as the base; MB: a million bytes. lanes: how many runs "
        "trained side by side and shared the machine while these were timed; times compare only "
        "between equal numbers and on one machine.",
    )
    return _table("cost", "Cost", columns, rows, notes, len(heads))


def _machine(record: Mapping[str, Any]) -> str:
    """Return the machine, precision and threads that times of a run belong to."""
    environment = record.get("environment") or {}
    known = [environment.get("machine") or environment.get("device"), environment.get("dtype")]
    if threads := environment.get("threads"):
        known.append(f"{threads} {'thread' if threads == 1 else 'threads'}")
    return ", ".join(str(part) for part in known if part)


def _cost(runs: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    def middle(part: str, key: str, form: str = ",.0f", scale: float = 1.0) -> Cell:
        values = [(r.get(part) or {}).get(key) for r in runs]
        known = [float(v) for v in values if v is not None]
        cell = number(median(known) / scale if known else None, form)
        return Cell(cell.text, median(known) / scale if known else None)

    seconds = middle("cost", "train_seconds", ",.1f")
    lanes = sorted({(r["cost"].get("lanes") or 1) for r in runs})
    return (
        Cell(seconds.text, seconds.value, tuple(r["id"] for r in runs)),
        middle("cost", "tokens_per_second"),
        middle("cost", "peak_memory_bytes", scale=1e6),
        middle("cost", "task_bytes"),
        middle("trainable", "encoder"),
        middle("trainable", "head"),
        Cell(_span(lanes), lanes),
        number(len(runs)),
    )


# ------------------------------------------------------------------ rates


def _rates(results: Results) -> list[tuple[Line, str, float, list[dict[str, Any]]]]:
    return [
        (line, task, found, runs)
        for line in results.lines
        for task in results.tasks
        for found, runs in results.by_rate(line, task).items()
    ]


def _best(runs: Sequence[Mapping[str, Any]], metric: str) -> Summary:
    return Summary(
        tuple(to_float(run["scores"].get(metric)) for run in runs),
        tuple(run["id"] for run in runs),
    )


def _plain_mean(values: Sequence[float]) -> str:
    found = Summary(tuple(values))
    spread = f" ± {found.spread:.1f}" if math.isfinite(found.spread) else ""
    return f"{found.mean:.1f}{spread}"


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return DASH if not found else "–".join(str(v) for v in dict.fromkeys((found[0], found[-1])))


def _table(
    key: str,
    title: str,
    columns: tuple[Column, ...],
    rows: Sequence[tuple[Cell, ...]],
    notes: tuple[str, ...],
    heads: int = 3,
) -> Table | None:
    return Table(key, title, columns, tuple(rows), notes, heads) if rows else None
