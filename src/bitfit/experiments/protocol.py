"""Which epoch and which rate count: two ways of choosing on dev.

``paper``: the best epoch and the best rate on dev are those reported on dev, as in the paper's
tables; the more that is tried, the more such a number flatters. ``split``: one half of dev chooses,
the other half reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfit.errors import BitfitError
from bitfit.metrics import compute_metrics
from bitfit.tasks import Task

Record = Mapping[str, Any]
Cell = tuple[str, str, str, int | None]
"""Row, base, task and training rows: what a number of a table stands for, before rate and seed."""

_SPLIT_SEED = 2021


@dataclass(frozen=True)
class EpochScores:
    """The headline score of each epoch of a run, on the rows that choose and those that report."""

    choosing: Sequence[float]
    reporting: Sequence[float]

    @property
    def best(self) -> int:
        """The place (from 0) of the best epoch; of equal ones the later."""
        return best_place(self.choosing)


@dataclass(frozen=True)
class Choice:
    """A run with the epoch that counts."""

    record: Record
    epoch: int
    """From 1."""
    score: float
    """The headline score that is reported, a fraction; NaN where it is undefined."""


def cell_of(record: Record) -> Cell:
    """Return the cell of a table that a run belongs to."""
    return record["row"], record["base"], record["task"]["name"], record["train_rows"]


def task_of(record: Record) -> Task:
    """Return the task of a run."""
    fields = dict(record["task"])
    return Task(**fields | {k: tuple(fields[k]) for k in ("labels", "metrics")})


@lru_cache(maxsize=64)
def halves(rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the dev rows that choose and of those that report, the same always."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    return np.sort(order[: rows // 2]), np.sort(order[rows // 2 :])


def best_place(scores: Sequence[float]) -> int:
    """Return the place of the largest score, the last of equals; an undefined one is the least."""
    return max(range(len(scores)), key=lambda i: (_least(scores[i]), i))


def paper_scores(record: Record) -> EpochScores:
    """Return a run's headline score on all of dev, epoch by epoch."""
    scores = [_number(epoch["dev"].get(record["metric"])) for epoch in record["history"]]
    return EpochScores(scores, scores)


def split_scores(
    record: Record, predictions: Mapping[str, Any] | None, answers: Sequence[Any] | None
) -> EpochScores | None:
    """Return the scores on the two halves of dev; None where predictions or answers are missing.

    Raises:
        BitfitError: they are of other epochs or rows than the run.
    """
    if predictions is None or answers is None:
        return None
    task, epochs = task_of(record), predictions["dev"]
    if len(epochs) != len(record["history"]) or any(len(e) != len(answers) for e in epochs):
        raise BitfitError(
            f"run {record['id']}: its predictions are not those of {len(record['history'])} epochs "
            f"on {len(answers)} dev rows; remove its record to have it made again"
        )

    def score(predicted: Sequence[Any], places: NDArray[np.int64]) -> float:
        chosen = [predicted[i] for i in places], [answers[i] for i in places]
        return compute_metrics(task, *chosen)[task.metric]

    return EpochScores(*([score(epoch, half) for epoch in epochs] for half in halves(len(answers))))


def choose_rate(
    scores: Iterable[tuple[Record, EpochScores]], failed: Iterable[Record] = ()
) -> float:
    """Return the learning rate with the best mean over the seeds that every rate was run with.

    Of equal rates the smallest. Each run counts with its best epoch on the rows that choose, a
    failed one as the worst: a rate that mostly diverges does not win by the run that did not. Among
    rates that all have a failed run, those that ended count.
    """
    found: dict[float, dict[int, float]] = {}
    for record, epochs in scores:
        config = record["config"]
        best = epochs.choosing[epochs.best]
        found.setdefault(config["learning_rate"], {})[config["seed"]] = _least(best)
    tried = {rate: dict(seeds) for rate, seeds in found.items()}
    for record in failed:
        config = record["config"]
        if config["learning_rate"] in found:
            tried[config["learning_rate"]].setdefault(config["seed"], -math.inf)
    common = set.intersection(*(set(seeds) for seeds in tried.values()))

    def worth(rate: float) -> tuple[float, float]:
        mean = float(np.mean([tried[rate][seed] for seed in common] or [-math.inf]))
        # Of equal rates the smallest, whatever other seeds one of them has.
        ended = 0.0 if math.isfinite(mean) else float(np.mean(list(found[rate].values())))
        return mean, ended

    return max(sorted(found), key=worth)


def choose(
    records: Iterable[Record], scores_of: Callable[[Record], EpochScores | None]
) -> dict[Cell, list[Choice]]:
    """Return for each cell the runs of its chosen rate, seed by seed, each with its best epoch.

    Failed runs count for the choice of the rate only; those that ``scores_of`` gives None for are
    left out.

    Args:
        records: of any cells.
        scores_of: :func:`paper_scores`, or :func:`split_scores` with what it needs.
    """
    cells: dict[Cell, list[tuple[Record, EpochScores]]] = {}
    failed: dict[Cell, list[Record]] = {}
    for record in records:
        if record["state"] != "done":
            failed.setdefault(cell_of(record), []).append(record)
            continue
        scores = scores_of(record)
        if scores is not None:
            cells.setdefault(cell_of(record), []).append((record, scores))
    chosen = {}
    for cell, runs in cells.items():
        rate = choose_rate(runs, failed.get(cell, ()))
        chosen[cell] = [
            Choice(record, epochs.best + 1, epochs.reporting[epochs.best])
            for record, epochs in sorted(runs, key=lambda run: run[0]["config"]["seed"])
            if record["config"]["learning_rate"] == rate
        ]
    return chosen


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
