"""Scores of predictions as fractions between 0 and 1 (correlations: -1 and 1): numpy in, float out.

The shapes that :func:`compute_metrics` takes, by kind of task:

=============== ============================================ ===================================
kind            predictions                                  references
=============== ============================================ ===================================
classification  class indices, ``(rows,)``                   class indices, ``(rows,)``
regression      floats, ``(rows,)``                          floats, ``(rows,)``
multilabel      tuples of class indices, or 0/1 ``(rows, L)``  the same
tokens          one sequence of class indices per sentence   the same; flat arrays do too
span            answer texts (None: no answer)               accepted answers per question
=============== ============================================ ===================================
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from bitfit.errors import UsageError
from bitfit.tasks import Task

Array = NDArray[Any]

CUT_OFF = -1
"""The predicted class of a word that the length limit cut off: it counts as wrong."""


def compute_metrics(task: Task, predictions: Any, references: Any) -> dict[str, float]:
    """Return every metric of ``task.metrics`` as a fraction, in that order.

    A metric that is not defined (no rows; a correlation with a constant) is NaN, never an error.

    Args:
        task: Says which metrics, and how many classes there are.
        predictions: What the model says, shaped as in the table at the top of this module.
        references: What is right, in the same shape.

    Raises:
        UsageError: on lengths that differ or a metric that the kind of task does not have.

    Example:
        >>> task = Task(name="mood", kind="classification", labels=("sad", "glad"))
        >>> compute_metrics(task, [0, 1, 1, 1], [0, 1, 1, 0])["accuracy"]
        0.75
    """
    if len(predictions) != len(references):
        raise UsageError(
            f"{len(predictions)} predictions for {len(references)} references: one each is needed"
        )
    table = _METRICS[task.kind]
    unknown = [name for name in task.metrics if name not in table]
    if unknown:
        raise UsageError(
            f"task {task.name!r}: {task.kind} has no metric {unknown[0]!r}; "
            f"it has {', '.join(sorted(table))}"
        )
    if len(references) == 0:
        return dict.fromkeys(task.metrics, math.nan)
    predicted, truth = _PREPARE[task.kind](task, predictions, references)
    return {name: table[name](predicted, truth) for name in task.metrics}


def majority_score(task: Task, references: Any) -> dict[str, float]:
    """Return the scores of a model that has learned nothing but the most frequent answer.

    Classification and tokens: the most frequent class, of equals the lowest; binary F1: class 1,
    which alone it counts. Multilabel: each label by its own majority. Regression: the mean, whose
    correlations are NaN. Span: nothing, ``{}``. MRPC's and QQP's F1 of always saying "1" is far
    from zero: this is the bar to pass.
    """
    if task.kind == "span" or len(references) == 0:
        return {}
    if task.kind == "regression":
        truth = np.asarray(references, dtype=np.float64)
        return compute_metrics(task, np.full_like(truth, truth.mean()), truth)
    if task.kind == "multilabel":
        matrix = indicator(references, len(task.labels))
        usual = (2 * matrix.sum(axis=0) > len(matrix)).astype(np.int64)
        return compute_metrics(task, np.tile(usual, (len(matrix), 1)), matrix)
    truth = _flat(references)
    if not len(truth):
        return {}
    scores = compute_metrics(task, np.full_like(truth, np.bincount(truth).argmax()), truth)
    if "f1" in scores:
        scores["f1"] = f1_binary(np.ones_like(truth), truth)
    return scores


# ------------------------------------------------------------------ classes


def accuracy(predictions: Array, references: Array) -> float:
    """Return the fraction of entries that agree; both arrays have the same shape."""
    return float(np.mean(predictions == references))


def f1_binary(predictions: Array, references: Array) -> float:
    """Return F1 of the class with index 1, as GLUE scores MRPC and QQP; 0 where nothing is hit."""
    return _f1(predictions == 1, references == 1, average="binary")


def f1_macro(predictions: Array, references: Array) -> float:
    """Return the mean F1 over the classes that occur in either array, each weighing the same."""
    classes = [c for c in np.union1d(predictions, references) if c != CUT_OFF]
    return _f1(predictions, references, labels=classes, average="macro")


def f1_micro(predictions: Array, references: Array) -> float:
    """Return F1 over all decisions together; with one class per row it equals the accuracy."""
    return accuracy(predictions, references)


def matthews(predictions: Array, references: Array) -> float:
    """Return Matthews' correlation for any number of classes; 0 where either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(references)) < 2 or len(np.unique(predictions)) < 2:
        return 0.0  # scikit-learn says so too, but warns of a single label
    return float(matthews_corrcoef(references, predictions))


def _f1(predictions: Array, references: Array, **options: Any) -> float:
    # Imported here: scikit-learn takes a second, and correlations and answers need none of it.
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, zero_division=0.0, **options))


# ------------------------------------------------------------------ several labels


def _multilabel_f1_macro(predictions: Array, references: Array) -> float:
    return _f1(predictions, references, average="macro")


def _multilabel_f1_micro(predictions: Array, references: Array) -> float:
    return _f1(predictions, references, average="micro")


def subset_accuracy(predictions: Array, references: Array) -> float:
    """Return the fraction of rows whose labels are all right; ``(rows, labels)`` arrays of 0/1."""
    return float(np.mean((predictions == references).all(axis=1)))


# ------------------------------------------------------------------ correlations


def pearson(predictions: Array, references: Array) -> float:
    """Return the linear correlation, NaN for fewer than two rows or a constant side."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (predictions, references))
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    # The mean of equal numbers can miss them by a rounding: look before subtracting.
    if (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    with np.errstate(all="ignore"):
        x, y = x - x.mean(), y - y.mean()
        # Scale by the largest entry first, so that the norm neither over- nor underflows.
        x, y = x / np.abs(x).max(), y / np.abs(y).max()
        r = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return min(1.0, max(-1.0, r)) if math.isfinite(r) else math.nan


def spearman(predictions: Array, references: Array) -> float:
    """Return the rank correlation (ties share their mean rank); NaN as in :func:`pearson`."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (predictions, references))
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    return pearson(rankdata(x), rankdata(y))


# ------------------------------------------------------------------ SQuAD v1.1

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return ``text`` in lower case without punctuation, articles and extra whitespace.

    The order of the steps is that of SQuAD's official ``evaluate-v1.1.py``.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the words shared by two answers after :func:`normalize_answer`.

    Two answers without any word left share none and score 0, as in the official script.
    """
    predicted, truth = normalize_answer(prediction).split(), normalize_answer(answer).split()
    shared = (Counter(predicted) & Counter(truth)).total()
    return 2 * shared / (len(predicted) + len(truth)) if shared else 0.0


def squad_exact_match(prediction: str, answer: str) -> float:
    """Return 1.0 where two answers are the same after :func:`normalize_answer`, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def _best_answer(
    score: Callable[[str, str], float],
) -> Callable[[Sequence[str | None], Sequence[Sequence[str]]], float]:
    """Return the metric that takes the best ``score`` over a question's answers, then the mean."""

    def metric(predictions: Sequence[str | None], references: Sequence[Sequence[str]]) -> float:
        pairs = zip(predictions, references, strict=True)
        return float(
            np.mean([max(score(p, a) for a in r) if p is not None else 0 for p, r in pairs])
        )

    return metric


# ------------------------------------------------------------------ shapes


def _flat(values: Any) -> Array:
    """Return one flat integer array from class indices, or from one sequence of them per row."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values.reshape(-1).astype(np.int64)
    if len(values) and np.ndim(values[0]) > 0:
        return np.concatenate([np.asarray(row, dtype=np.int64).reshape(-1) for row in values])
    return np.asarray(values, dtype=np.int64)


def indicator(values: Any, num_labels: int) -> Array:
    """Return a 0/1 array of shape ``(rows, num_labels)`` from one, or from tuples of indices."""
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return values.astype(np.int64)
    matrix = np.zeros((len(values), num_labels), dtype=np.int64)
    for row, indices in enumerate(values):
        matrix[row, list(indices)] = 1
    return matrix


def _prepare_classes(task: Task, predictions: Any, references: Any) -> tuple[Array, Array]:
    if "f1" in task.metrics and len(task.labels) != 2:
        raise UsageError(
            f"task {task.name!r}: the metric 'f1' is for two labels, this task has "
            f"{len(task.labels)}; use 'f1_macro'"
        )
    return _flat(predictions), _flat(references)


def _prepare_tokens(task: Task, predictions: Any, references: Any) -> tuple[Array, Array]:
    predicted, truth = _flat(predictions), _flat(references)
    if len(predicted) != len(truth):
        raise UsageError(
            f"{len(predicted)} predicted words for {len(truth)}: "
            f"give {CUT_OFF} for a word that was cut off"
        )
    return predicted, truth


def _prepare_floats(task: Task, predictions: Any, references: Any) -> tuple[Array, Array]:
    predicted, truth = (np.asarray(v, dtype=np.float64) for v in (predictions, references))
    return predicted.reshape(-1), truth.reshape(-1)


def _prepare_multilabel(task: Task, predictions: Any, references: Any) -> tuple[Array, Array]:
    return indicator(predictions, len(task.labels)), indicator(references, len(task.labels))


def _prepare_spans(
    task: Task, predictions: Sequence[str | None], references: Sequence[Any]
) -> tuple[Sequence[str | None], list[list[str]]]:
    """Return the references as texts: an answer may come as ``(character offset, text)``."""
    answers = [
        [a if isinstance(a, str) else a[1] for a in accepted or ()] for accepted in references
    ]
    for row, accepted in enumerate(answers):
        if not accepted:
            # The official script takes the max over no answers here, and dies.
            raise UsageError(f"question {row} has no accepted answer: SQuAD v1.1 asks for one")
    return predictions, answers


_CLASS_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "f1": f1_binary,
    "f1_macro": f1_macro,
    "f1_micro": f1_micro,
    "matthews": matthews,
}
_METRICS: dict[str, dict[str, Callable[[Any, Any], float]]] = {
    "classification": _CLASS_METRICS,
    "tokens": {name: _CLASS_METRICS[name] for name in ("accuracy", "f1_macro")},
    "regression": {"pearson": pearson, "spearman": spearman},
    "multilabel": {
        "f1_micro": _multilabel_f1_micro,
        "f1_macro": _multilabel_f1_macro,
        "subset_accuracy": subset_accuracy,
    },
    "span": {"f1": _best_answer(squad_f1), "exact_match": _best_answer(squad_exact_match)},
}
_PREPARE: dict[str, Callable[[Task, Any, Any], tuple[Any, Any]]] = {
    "classification": _prepare_classes,
    "tokens": _prepare_tokens,
    "regression": _prepare_floats,
    "multilabel": _prepare_multilabel,
    "span": _prepare_spans,
}
