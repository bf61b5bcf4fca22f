"""Which differences are more than noise: a paired bootstrap over examples, and the seeds' spread.

A score moves with the dev rows that happen to be asked and with the seed. The examples are drawn
again, together for all runs, as they share the dev rows; differences are taken pairwise where two
rows were trained with the same seeds. The variance of a mean over S seeds has two parts: what the
examples move in all seeds alike, from the resamples, and what differs from seed to seed, from the
spread of the seeds. The examples move each seed otherwise too; this is in both, and counted once.

Few seeds say little about their own spread: by chance it may look small. So each part reaches by
its own quantile, the examples' by that of the normal distribution, the seeds' by Student's t with
S - 1 degrees of freedom, and the interval by the root of the sum of squares. Banerjee (1961,
Sankhya 23) shows that such an interval holds at least as often as it says, whichever part is the
larger; Satterthwaite's degrees of freedom, which suppose that the seeds' part is known to be small
where it looks small, do not at levels like these. The level is Bonferroni's: 95 % for all
comparisons of a table together, so 1 - 0.05 / comparisons for each.
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
    own = sum(_examples_of_each(each) for each in draws)
    examples = standard_error(np.asarray(means)) ** 2
    shared = _Part(float(np.maximum(0.0, examples - own)), math.inf)  # NaN stays NaN
    parts = [shared, *(_seeds_part(list(scores.values())) for scores, *_ in sides)]
    basis = "examples and seeds" if fewest > 1 else "examples"
    return _judge(value, parts, basis, fewest, bool(common), comparisons, least=examples)


def seeds_difference(
    row_scores: Mapping[int, float],
    reference_scores: Mapping[int, float],
    *,
    comparisons: int = 1,
) -> Difference:
    """Return a row's difference to the reference row where only scores are known: Student's t.

    Pairwise over the seeds that both have; where they have none in common, each side's.
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
    parts = [_seeds_part(side) for side in sides]
    return _judge(value, parts, "seeds", fewest, bool(common), comparisons)


def quantile(freedom: float, comparisons: int) -> float:
    """Return how many standard errors an interval reaches to each side, after Bonferroni."""
    level = 1 - ALPHA / (2 * max(1, comparisons))
    return float(stats.t.ppf(level, freedom) if math.isfinite(freedom) else stats.norm.ppf(level))


@dataclass(frozen=True)
class _Part:
    """A part of the variance of a difference."""

    variance: float
    freedom: float
    """Degrees of freedom of its estimate; infinite where it is as good as known."""


def _seeds_part(scores: Sequence[float]) -> _Part:
    """Return the squared standard error of a mean over seeds; 0 for one seed."""
    if len(scores) < 2:
        return _Part(0.0, math.inf)
    return _Part(float(np.var(scores, ddof=1)) / len(scores), len(scores) - 1)


def _examples_of_each(draws: Floats) -> float:
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


def _judge(
    value: float, parts: Sequence[_Part], basis: str, seeds: int, paired: bool, many: int,
    least: float = 0.0,
) -> Difference:  # fmt: skip
    """Return a difference with its interval and the word for it.

    Args:
        value: the difference.
        parts: of its variance.
        basis: what they are of.
        seeds: how many.
        paired: whether both rows have these.
        many: comparisons that the interval is to hold for together.
        least: what is known of the variance without the seeds; they may agree by chance.
    """
    variance = sum(part.variance for part in parts)
    error = math.sqrt(max(variance, least))
    # Seeds that agree but for rounding bound nothing.
    unmoved = value != 0.0 and error <= 1e-12 * abs(value)
    if unmoved or not (math.isfinite(value) and math.isfinite(error)):
        return Difference(value, math.nan, math.nan, "not known", "", seeds, paired)
    reach = math.sqrt(sum(quantile(part.freedom, many) ** 2 * part.variance for part in parts))
    reach = max(reach, quantile(math.inf, many) * math.sqrt(least))
    low, high = value - reach, value + reach
    word: Word = "within noise"
    if low > 0 or high < 0:
        word = "ahead" if low > 0 else "behind"
        word = word if seeds > 1 else "one seed only"
    elif abs(value) > quantile(math.inf, many) * error:
        word = "too few seeds"
    return Difference(value, low, high, word, basis, seeds, paired)
