"""Metrics over many resamples of the same examples at once, as :mod:`bitfit.metrics` scores one.

A resample of n examples is a row of n counts: how often each was drawn. Nearly every metric is a
function of a few sums over the examples, and the sums of all resamples are one matrix product,
counts ``(resamples, n)`` times statistics ``(n, k)``. Spearman's ranks come from the counts, too:
the rank of a value is how many of the drawn lie below it, exactly, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfit.metrics import CUT_OFF, compute_metrics, indicator
from bitfit.tasks import Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scorer = Callable[[Floats], Floats]
"""Counts ``(resamples, n)`` -> scores ``(resamples,)``, NaN where a metric is not defined."""


def make_scorer(
    task: Task, metric: str, predictions: Sequence[Any], answers: Sequence[Any]
) -> Scorer:
    """Return the metric of one run's predictions as a function of how often each row is drawn.

    Args:
        task: says the kind and the labels.
        metric: one that :func:`bitfit.metrics.compute_metrics` has for the kind.
        predictions: one per example, in the shapes of :mod:`bitfit.metrics`.
        answers: the same.

    Raises:
        KeyError: a metric that the kind does not have.
    """
    return _MAKERS[task.kind][metric](task, predictions, answers)


def _from_sums(statistics: Floats, finish: Callable[[Floats], Floats]) -> Scorer:
    """Return the scorer that applies ``finish`` to the drawn sums of ``(n, k)`` statistics."""

    def score(counts: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return finish(counts @ statistics)

    return score


def _ratio(sums: Floats) -> Floats:
    return np.asarray(sums[:, 0] / sums[:, 1])


def _mean(values: Sequence[float] | NDArray[Any]) -> Scorer:
    column = np.asarray(values, dtype=np.float64)
    return _from_sums(np.stack([column, np.ones_like(column)], axis=1), _ratio)


# ------------------------------------------------------------------ classes


def _accuracy(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    return _mean(np.asarray(predictions) == np.asarray(answers))


def _f1_binary(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    hits = _hits(np.asarray(predictions)[:, None], np.asarray(answers)[:, None], [1])
    return _from_sums(hits.reshape(len(hits), -1), lambda sums: _f1(sums[:, None])[:, 0])


def _f1_macro(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    """Return the mean F1 over the classes that occur in the resample, as predicted or as right."""
    words = [np.atleast_1d(p) for p in predictions], [np.atleast_1d(a) for a in answers]
    classes = [c for c in np.unique(np.concatenate([*words[0], *words[1]])) if c != CUT_OFF]
    hits = np.stack([_hits(p[None], a[None], classes)[0] for p, a in zip(*words, strict=True)])

    def finish(sums: Floats) -> Floats:
        found = sums.reshape(len(sums), len(classes), 3)
        occurs = found[:, :, 1:].sum(axis=2) > 0
        return np.asarray((_f1(found) * occurs).sum(axis=1) / occurs.sum(axis=1))

    return _from_sums(hits.reshape(len(hits), -1), finish)


def _hits(predicted: NDArray[Any], right: NDArray[Any], classes: Sequence[int]) -> Floats:
    """Return ``(n, classes, 3)`` of ``(n, words)``: how often both, predicted and right say it."""
    wanted = np.asarray(classes, dtype=np.int64)
    p, r = predicted[:, :, None] == wanted, right[:, :, None] == wanted
    return np.stack([(p & r).sum(axis=1), p.sum(axis=1), r.sum(axis=1)], axis=2).astype(np.float64)


def _f1(found: Floats) -> Floats:
    """Return F1 of ``(..., 3)`` both, predicted, right; 0 where there is neither."""
    total = found[..., 1] + found[..., 2]
    return np.asarray(2 * found[..., 0] / np.where(total > 0, total, 1.0))


def _matthews(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    p, r = np.asarray(predictions), np.asarray(answers)
    hits = _hits(p[:, None], r[:, None], list(np.union1d(p, r)))

    def finish(sums: Floats) -> Floats:
        both, predicted, right = np.moveaxis(sums.reshape(len(sums), -1, 3), 2, 0)
        n = right.sum(axis=1)
        top = both.sum(axis=1) * n - (predicted * right).sum(axis=1)
        below = (n**2 - (predicted**2).sum(axis=1)) * (n**2 - (right**2).sum(axis=1))
        return np.where(below > 0, top / np.sqrt(np.where(below > 0, below, 1.0)), 0.0)

    return _from_sums(hits.reshape(len(hits), -1), finish)


# ------------------------------------------------------------------ words, several labels, answers


def _word_accuracy(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    pairs = list(zip(predictions, answers, strict=True))
    right = [float(np.sum(np.asarray(p) == np.asarray(a))) for p, a in pairs]
    return _from_sums(np.array([right, [float(len(a)) for _, a in pairs]]).T, _ratio)


def _multilabel_f1(average: str) -> Callable[[Task, Sequence[Any], Sequence[Any]], Scorer]:
    def make(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
        p, r = (indicator(values, len(task.labels)) for values in (predictions, answers))
        hits = np.stack([p & r, p, r], axis=2).astype(np.float64)

        def finish(sums: Floats) -> Floats:
            found = sums.reshape(len(sums), -1, 3)
            if average == "micro":
                return _f1(found.sum(axis=1))
            return np.asarray(_f1(found).mean(axis=1))

        return _from_sums(hits.reshape(len(hits), -1), finish)

    return make


def _subset_accuracy(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    p, r = (indicator(values, len(task.labels)) for values in (predictions, answers))
    return _mean((p == r).all(axis=1))


def _answer_metric(metric: str) -> Callable[[Task, Sequence[Any], Sequence[Any]], Scorer]:
    """Return the maker for a metric that is the mean of a value per question."""

    def make(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
        one = Task(name=task.name, kind="span", metrics=(metric,))
        pairs = zip(predictions, answers, strict=True)
        return _mean([compute_metrics(one, [p], [a])[metric] for p, a in pairs])

    return make


# ------------------------------------------------------------------ correlations


def _pearson(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    x, y = _numbers(predictions), _numbers(answers)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return _undefined
    x, y = x - x.mean(), y - y.mean()
    statistics = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)

    def finish(sums: Floats) -> Floats:
        n, sx, sy, sxx, syy, sxy = sums.T
        vx, vy = sxx - sx * sx / n, syy - sy * sy / n
        # What a resample of equal numbers leaves is rounding.
        moves = (vx > 1e-12 * sxx) & (vy > 1e-12 * syy)
        return _correlation(sxy - sx * sy / n, vx, vy, moves)

    return _from_sums(statistics, finish)


def _spearman(task: Task, predictions: Sequence[Any], answers: Sequence[Any]) -> Scorer:
    x, y = _numbers(predictions), _numbers(answers)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return _undefined
    rank_x, rank_y = _ranker(x), _ranker(y)

    def score(counts: Floats) -> Floats:
        a, b = rank_x(counts), rank_y(counts)
        drawn_a = counts * a
        vx = np.einsum("ij,ij->i", drawn_a, a)
        vy = np.einsum("ij,ij,ij->i", counts, b, b)
        moves = (vx > 0) & (vy > 0)
        return _correlation(np.einsum("ij,ij->i", drawn_a, b), vx, vy, moves)

    return score


def _ranker(values: Floats) -> Callable[[Floats], Floats]:
    """Return the function from counts to twice the rank of each value, less its mean: integers."""
    order = np.argsort(values, kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    group = np.empty(len(values), dtype=np.int64)
    group[order] = place

    def ranks(counts: Floats) -> Floats:
        drawn = np.add.reduceat(counts[:, order], starts, axis=1)
        doubled = 2 * np.cumsum(drawn, axis=1) - drawn - counts.sum(axis=1, keepdims=True)
        return np.asarray(doubled[:, group])

    return ranks


def _correlation(top: Floats, vx: Floats, vy: Floats, moves: NDArray[np.bool_]) -> Floats:
    below = np.sqrt(np.where(moves, vx, 1.0)) * np.sqrt(np.where(moves, vy, 1.0))
    return np.where(moves, np.clip(top / below, -1.0, 1.0), math.nan)


def _numbers(values: Sequence[Any]) -> Floats:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64).reshape(-1)


def _undefined(counts: Floats) -> Floats:
    return np.full(len(counts), math.nan)


_Maker = Callable[[Task, Sequence[Any], Sequence[Any]], Scorer]
_MAKERS: dict[str, dict[str, _Maker]] = {
    "classification": {
        "accuracy": _accuracy,
        "f1": _f1_binary,
        "f1_macro": _f1_macro,
        "f1_micro": _accuracy,
        "matthews": _matthews,
    },
    "tokens": {"accuracy": _word_accuracy, "f1_macro": _f1_macro},
    "regression": {"pearson": _pearson, "spearman": _spearman},
    "multilabel": {
        "f1_micro": _multilabel_f1("micro"),
        "f1_macro": _multilabel_f1("macro"),
        "subset_accuracy": _subset_accuracy,
    },
    "span": {"f1": _answer_metric("f1"), "exact_match": _answer_metric("exact_match")},
}
