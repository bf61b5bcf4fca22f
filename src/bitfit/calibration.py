"""Confidence that can be believed: one temperature fitted on dev, and how far off it still is.

Guo et al. 2017, "On Calibration of Modern Neural Networks". Everything is float64 numpy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax

from bitfit.errors import UsageError

Floats = NDArray[np.float64]

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Where a temperature is looked for: a perfect dev score would drive it to zero without a bound."""
CALIBRATED_KINDS = ("classification", "multilabel", "tokens")
"""The kinds of task whose answers are probabilities; a number or a span is given without one."""


def probabilities(
    logits: ArrayLike, temperature: float = 1.0, *, multilabel: bool = False
) -> Floats:
    """Return probabilities of the shape of ``logits``, ``(rows, labels)``.

    Args:
        logits: What the head gives.
        temperature: What to divide them by: above 1 less sure, below 1 more.
        multilabel: A sigmoid per label in place of a softmax over them.
    """
    if not temperature > 0:
        raise UsageError(f"a temperature is above 0, got {temperature}")
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    if multilabel:
        return np.asarray(expit(scaled), dtype=np.float64)
    # Written out: scipy's softmax takes ten times as long on one row, and a server asks row by row.
    raised = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), dtype=np.float64)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the one temperature that makes ``labels`` most likely, between 0.05 and 20.

    Deterministic: a bounded search over the logarithm, in which the likelihood has one valley.

    Args:
        logits: ``(rows, labels)``, of rows the model was not trained on.
        labels: Class indices ``(rows,)``; or 0/1 ``(rows, labels)`` for multilabel.

    Raises:
        UsageError: on shapes that do not fit, no rows, or logits that are not finite.
    """
    scores, truth = _checked(logits, labels)

    def loss(log_temperature: float) -> float:
        return _negative_log_likelihood(scores / math.exp(log_temperature), truth)

    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(math.exp(found.x))


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = 15
) -> float:
    """Return the mean distance between confidence and accuracy over bins of equal width.

    Classification looks at the most likely class of each row; multilabel (``labels`` of shape
    ``(rows, labels)``) at each label's probability against how often that label is right.

    Args:
        probabilities: ``(rows, labels)``, between 0 and 1.
        labels: Class indices ``(rows,)``, or 0/1 ``(rows, labels)``.
        bins: How many bins; Guo et al. take 15.
    """
    if bins < 1:
        raise UsageError(f"at least one bin is needed, got {bins}")
    shares, truth = _checked(probabilities, labels)
    if truth.ndim == 1:
        confidence, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    else:
        confidence, right = shares.reshape(-1), truth.reshape(-1) == 1
    # Bin b holds the confidences in (b / bins, (b + 1) / bins], as in the paper; 0 joins bin 0.
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=confidence - right, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def _negative_log_likelihood(scores: Floats, truth: NDArray[np.int64]) -> float:
    if truth.ndim == 2:
        # log(1 + e^s) - s * y, stable for large scores of either sign
        return float(np.mean(np.logaddexp(0, scores) - scores * truth))
    return -float(np.mean(log_softmax(scores, axis=1)[np.arange(len(truth)), truth]))


def _checked(scores: Any, labels: Any) -> tuple[Floats, NDArray[np.int64]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if values.ndim != 2 or truth.shape not in (values.shape, values.shape[:1]) or not values.size:
        raise UsageError(
            f"logits of shape (rows, labels) and labels of shape (rows,) or (rows, labels) are "
            f"needed, with at least one row; got {values.shape} and {truth.shape}"
        )
    if not np.isfinite(values).all():
        raise UsageError("a logit or probability is not finite")
    top = values.shape[1] if truth.ndim == 1 else 2
    if truth.min() < 0 or truth.max() >= top:
        raise UsageError(f"a label is {truth.min()}..{truth.max()}, expected 0..{top - 1}")
    return values, truth
