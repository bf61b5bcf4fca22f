"""Which differences are more than noise: a paired bootstrap over examples, and the seeds' spread.

A score moves with the dev rows that happen to be asked and with the seed. The examples are drawn
again, together for all runs, as they share the dev rows; differences are taken pairwise where two
rows were trained with the same seeds. The variance of the mean over S seeds is that of its
resamples, and what the seeds move on top: their own variance, less what the examples alone make
of it, which the resamples have already, divided by S.

Few seeds say little about their own spread. So the interval is that of Student's t with the degrees
of freedom of Welch and Satterthwaite: many where the examples make the noise, S - 1 where the seeds
do. The level is Bonferroni's: 95 % for all comparisons of a table together, so
1 - 0.05 / comparisons for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from bitfit.experiments.report.scorers import Floats, Scorer

Word = Literal["ahead", "behind", "within noise", "too few seeds", "one seed only", "not known"]
RESAMPLES = 2000
ALPHA = 0.05
_SEED = 2022
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Difference:
    """The mean score of a row less that of the row it is compared with."""

    value: float
    """A fraction; NaN where not known."""
    low: float
    """The lower end of the interval, NaN where there is none."""
    high: float
    """The upper end."""
    word: Word
    """``ahead``, ``behind``, ``within noise``; ``one seed only``: other examples would not turn it,
    another seed may; ``too few seeds``: zero is inside only as these few seeds do not say how far
    they spread; ``not known``: nothing to judge by."""
    basis: str
    """What the noise is of: ``examples and seeds``, ``examples``, ``seeds`` or nothing."""
    seeds: int
    """How many seeds it is of: pairs where the seeds are paired, else the fewer."""
    paired: bool
    """Whether both rows have these seeds."""


def draw_counts(rows: int, resamples: int = RESAMPLES) -> Iterator[Floats]:
    """Return the resamples of ``rows`` examples as counts ``(some, rows)``, the same every time."""
    rng = np.random.default_rng((_SEED, rows))
    step = max(1, min(resamples, _CHUNK // max(rows, 1)))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, rows, size=(size, rows))
        drawn += rows * np.arange(size)[:, None]
        flat = np.bincount(drawn.ravel(), minlength=size * rows)
        yield flat.reshape(size, rows).astype(np.float64)


def resample(scorers: Sequence[Scorer], rows: int, resamples: int = RESAMPLES) -> Floats:
    """Return the scores ``(scorers, resamples)``, in each resample of the same examples for all."""
    if not scorers or not rows:
        return np.full((len(scorers), resamples), math.nan)
    parts = [[score(counts) for score in scorers] for counts in draw_counts(rows, resamples)]
    return np.concatenate([np.array(part) for part in parts], axis=1)


def standard_error(draws: Floats) -> float:
    """Return how far one score moves with the examples; NaN where most resamples have none."""
    defined = draws[np.isfinite(draws)]
    if len(defined) < max(2, len(draws) / 2):
        return math.nan
    return float(np.std(defined, ddof=1))


def bootstrap_difference(
    row: Mapping[int, Floats],
    reference: Mapping[int, Floats],
    row_scores: Mapping[int, float],
    reference_scores: Mapping[int, float],
    *,
    comparisons: int = 1,
) -> Difference:
    """Return a row's difference to the reference row, with the noise of examples and seeds.

    Args:
        row: seed -> its scores in the resamples, ``(resamples,)``, from :func:`resample`.
        reference: the same of the other row, in the same resamples.
        row_scores: seed -> score on the examples as they are.
        reference_scores: the same of the other row.
        comparisons: how many differences the interval is to hold for together.
    """
    common = sorted(set(row) & set(reference))
    if common:
        ours = {s: row_scores[s] - reference_scores[s] for s in common}
        sides = [(ours, {s: row[s] - reference[s] for s in common}, 1.0)]
    else:
        sides = [(dict(row_scores), dict(row), 1.0), (dict(reference_scores), dict(reference), -1)]
    value = sum(sign * float(np.mean(list(scores.values()))) for scores, _, sign in sides)
    fewest = min(len(scores) for scores, *_ in sides)
    draws = [np.stack([drawn[seed] for seed in sorted(drawn)]) for _, drawn, _ in sides]
    means = sum(sign * each.mean(axis=0) for each, (*_, sign) in zip(draws, sides, strict=True))
    spreads = [list(scores.values()) for scores, *_ in sides]
    variance = standard_error(np.asarray(means)) ** 2
    for each, spread in zip(draws, spreads, strict=True):
        variance += max(0.0, _mean_variance(spread) - _examples_part(each))
    error = math.sqrt(variance)
    freedom = _freedom(variance, spreads)
    basis = "examples and seeds" if fewest > 1 else "examples"
    return _judge(value, error, freedom, basis, fewest, bool(common), comparisons)


def seeds_difference(
    row_scores: Mapping[int, float],
    reference_scores: Mapping[int, float],
    *,
    comparisons: int = 1,
) -> Difference:
    """Return a row's difference to the reference row where only scores are known: Student's t.

    Pairwise over the seeds that both have; where they have none in common, Welch's.
    """
    common = sorted(set(row_scores) & set(reference_scores))
    if common:
        sides = [[row_scores[s] - reference_scores[s] for s in common]]
        value = float(np.mean(sides[0]))
    else:
        sides = [list(row_scores.values()), list(reference_scores.values())]
        value = float(np.mean(sides[0]) - np.mean(sides[1])) if all(sides) else math.nan
    fewest = min(len(side) for side in sides)
    if fewest < 2:
        return Difference(value, math.nan, math.nan, "not known", "", fewest, bool(common))
    variance = sum(_mean_variance(side) for side in sides)
    freedom = _freedom(variance, sides)
    error = math.sqrt(variance)
    return _judge(value, error, freedom, "seeds", fewest, bool(common), comparisons)


def quantile(freedom: float, comparisons: int) -> float:
    """Return how many standard errors an interval reaches to each side, after Bonferroni."""
    level = 1 - ALPHA / (2 * max(1, comparisons))
    return float(stats.t.ppf(level, freedom) if math.isfinite(freedom) else stats.norm.ppf(level))


def _examples_part(draws: Floats) -> float:
    """Return what examples add to the variance of a mean over seeds by moving each seed otherwise.

    Args:
        draws: ``(seeds, resamples)``. What they share in a resample is no spread of the seeds.
    """
    draws = draws[:, np.isfinite(draws).all(axis=0)]
    count, resamples = draws.shape
    if count < 2 or resamples < 2:
        return 0.0
    own = np.var(draws - draws.mean(axis=0), axis=1, ddof=1).sum() / (count - 1)
    return float(own / count)


def _mean_variance(scores: Sequence[float]) -> float:
    """Return the squared standard error of a mean over seeds; 0 for one seed."""
    return float(np.var(scores, ddof=1)) / len(scores) if len(scores) > 1 else 0.0


def _freedom(variance: float, sides: Sequence[Sequence[float]]) -> float:
    """Return Welch's and Satterthwaite's degrees of freedom of the whole ``variance``.

    What is not of the seeds is of the examples, and has as good as infinitely many.
    """
    parts = [(_mean_variance(side), len(side) - 1) for side in sides if len(side) > 1]
    below = sum(part**2 / freedom for part, freedom in parts)
    least = min((freedom for _, freedom in parts), default=math.inf)
    return max(least, variance**2 / below) if below > 0 else math.inf


def _judge(
    value: float, error: float, freedom: float, basis: str, seeds: int, paired: bool, many: int
) -> Difference:
    # Seeds that agree but for rounding bound nothing.
    unmoved = value != 0.0 and error <= 1e-12 * abs(value)
    if unmoved or not (math.isfinite(value) and math.isfinite(error)):
        return Difference(value, math.nan, math.nan, "not known", "", seeds, paired)
    reach = quantile(freedom, many) * error
    low, high = value - reach, value + reach
    word: Word = "within noise"
    if low > 0 or high < 0:
        word = "ahead" if low > 0 else "behind"
        word = word if seeds > 1 else "one seed only"
    elif abs(value) > quantile(math.inf, many) * error:
        word = "too few seeds"
    return Difference(value, low, high, word, basis, seeds, paired)
