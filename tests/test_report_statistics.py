"""Resampled metrics equal those of bitfit.metrics; differences carry honest intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bitfit import metrics
from bitfit.experiments.report import scorers
from bitfit.experiments.report.scorers import make_scorer
from bitfit.experiments.report.statistics import (
    bootstrap_difference,
    draw_counts,
    quantile,
    resample,
    seeds_difference,
    standard_error,
)
from bitfit.metrics import compute_metrics
from bitfit.tasks import Task

FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def of_kind(kind, rng, rows, labels):
    """Predictions and answers of a kind, with ties, cut-off words and rare classes."""
    if kind == "classification":
        return rng.integers(0, labels, rows).tolist(), rng.integers(0, labels, rows).tolist()
    if kind == "regression":
        return (rng.integers(0, 9, rows) / 4).tolist(), (rng.integers(0, 6, rows) / 2).tolist()
    if kind == "multilabel":
        draw = lambda: [np.flatnonzero(rng.random(labels) < 0.4).tolist() for _ in range(rows)]  # noqa: E731
        return draw(), draw()
    if kind == "tokens":
        lengths = rng.integers(1, 6, rows)
        return (
            [rng.integers(-1, labels, n).tolist() for n in lengths],
            [rng.integers(0, labels, n).tolist() for n in lengths],
        )
    words = ["the red house", "red", "a dog", "dog house", "Red!", ""]
    pick = lambda: words[rng.integers(0, len(words))]  # noqa: E731
    return [pick() for _ in range(rows)], [[[0, pick()], [4, pick()]] for _ in range(rows)]


METRICS = [
    ("classification", "accuracy", 3),
    ("classification", "f1_macro", 4),
    ("classification", "f1_micro", 3),
    ("classification", "f1", 2),
    ("classification", "matthews", 2),
    ("classification", "matthews", 4),
    ("regression", "pearson", 0),
    ("regression", "spearman", 0),
    ("multilabel", "f1_micro", 3),
    ("multilabel", "f1_macro", 3),
    ("multilabel", "subset_accuracy", 3),
    ("tokens", "accuracy", 4),
    ("tokens", "f1_macro", 4),
    ("span", "f1", 0),
    ("span", "exact_match", 0),
]


@pytest.mark.parametrize(("kind", "metric", "labels"), METRICS)
@given(seed=SEEDS, rows=st.integers(2, 12))
@FEW
def test_a_resampled_metric_is_the_metric_of_the_drawn_rows(kind, metric, labels, seed, rows):
    rng = np.random.default_rng(seed)
    predictions, answers = of_kind(kind, rng, rows, labels)
    names = tuple(f"c{i}" for i in range(labels))
    task = Task(name="t", kind=kind, labels=names, metrics=(metric,))
    counts = np.stack([np.bincount(rng.integers(0, rows, rows), minlength=rows) for _ in range(5)])
    counts = np.concatenate([counts, np.ones((1, rows), dtype=int), np.eye(rows, dtype=int) * rows])
    found = make_scorer(task, metric, predictions, answers)(counts.astype(float))
    for row, score in zip(counts, found, strict=True):
        drawn = np.repeat(np.arange(rows), row)
        wanted = compute_metrics(
            task, [predictions[i] for i in drawn], [answers[i] for i in drawn]
        )[metric]
        assert score == pytest.approx(wanted, abs=1e-9, nan_ok=True)


def test_ranks_of_a_resample_are_scipys_ties_included():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 20, 300) / 4, rng.integers(0, 10, 300) / 2
    task = Task(name="t", kind="regression")
    counts = next(draw_counts(300, 20))
    found = make_scorer(task, "spearman", x.tolist(), y.tolist())(counts)
    for row, score in zip(counts.astype(int), found, strict=True):
        drawn = np.repeat(np.arange(300), row)
        assert score == pytest.approx(stats.spearmanr(x[drawn], y[drawn]).statistic, abs=1e-12)


def test_a_prediction_that_is_no_number_leaves_a_correlation_undefined():
    task = Task(name="t", kind="regression")
    for metric in task.metrics:
        scorer = make_scorer(task, metric, [0.1, None, 0.3], [1.0, 2.0, 3.0])
        assert np.isnan(scorer(np.ones((2, 3)))).all()


def test_resamples_are_the_same_every_time_and_have_all_their_rows():
    one, two = (np.concatenate(list(draw_counts(40, 30))) for _ in range(2))
    assert (one == two).all()
    assert one.shape == (30, 40)
    assert (one.sum(axis=1) == 40).all()


def test_the_standard_error_of_an_accuracy_is_that_of_a_share():
    """RTE: 277 rows at 70 %, about 2.8 points."""
    task = Task(name="rte", kind="classification", labels=("a", "b"))
    right = np.arange(277) < 194
    draws = resample([make_scorer(task, "accuracy", right.astype(int), [1] * 277)], 277)
    share = 194 / 277
    assert standard_error(draws[0]) == pytest.approx(math.sqrt(share * (1 - share) / 277), rel=0.05)
    assert math.isnan(standard_error(np.full(10, math.nan)))


def runs_of(offset, seeds, *, rows=400, noise=0.02):
    """seed -> resampled accuracies and seed -> accuracy of made-up runs."""
    task = Task(name="t", kind="classification", labels=("a", "b"))
    easy = np.random.default_rng(0).random(rows)
    draws, scores = {}, {}
    for seed in seeds:
        rng = np.random.default_rng((7, seed))
        level = 0.7 + offset + noise * rng.standard_normal()
        right = (easy < level).astype(int)
        draws[seed] = resample([make_scorer(task, "accuracy", right, [1] * rows)], rows)[0]
        scores[seed] = float(right.mean())
    return draws, scores


def difference_of(one, other, **options):
    return bootstrap_difference(one[0], other[0], one[1], other[1], **options)


def test_a_clear_difference_is_ahead_and_behind_the_other_way_round():
    high, low = runs_of(0.2, range(3)), runs_of(0.0, range(3))
    found = difference_of(high, low)
    assert found.word == "ahead"
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(
        np.mean([high[1][s] - low[1][s] for s in range(3)]), abs=1e-12
    )
    assert (found.basis, found.seeds, found.paired) == ("examples and seeds", 3, True)
    assert difference_of(low, high).word == "behind"
    assert difference_of(low, low).word == "within noise"
    assert difference_of(low, low).low == 0.0


def test_more_comparisons_widen_the_interval():
    high, low = runs_of(0.05, range(4)), runs_of(0.0, range(10, 14))
    one, many = (difference_of(high, low, comparisons=n) for n in (1, 30))
    assert many.low < one.low
    assert many.high > one.high
    assert not one.paired
    assert quantile(math.inf, 1) == pytest.approx(1.959964, abs=1e-6)
    assert quantile(2, 1) == pytest.approx(4.302653, abs=1e-6)


def test_one_seed_can_say_noise_but_not_ahead():
    high, low = runs_of(0.2, [0]), runs_of(0.0, [0])
    found = difference_of(high, low)
    assert (found.word, found.basis) == ("one seed only", "examples")
    assert difference_of(low, low).word == "within noise"


def test_two_seeds_that_disagree_on_how_much_are_too_few_and_no_noise():
    """Student's interval of two is 13 times the error wide: it says nothing, and not that all is
    noise."""
    low = runs_of(0.0, [0, 1])
    high = (
        {s: d + g for (s, d), g in zip(low[0].items(), (0.2, 0.4), strict=True)},
        {s: v + g for (s, v), g in zip(low[1].items(), (0.2, 0.4), strict=True)},
    )
    found = difference_of(high, low)
    assert found.low < 0 < found.high
    assert found.word == "too few seeds"
    near = (
        {s: d + g for (s, d), g in zip(low[0].items(), (-0.2, 0.4), strict=True)},
        {s: v + g for (s, v), g in zip(low[1].items(), (-0.2, 0.4), strict=True)},
    )
    assert difference_of(near, low).word == "within noise"


def test_only_seeds_that_both_have_are_compared():
    high, low = runs_of(0.2, [0, 1, 2]), runs_of(0.0, [1, 2, 3])
    found = difference_of(high, low)
    assert found.seeds == 2
    assert found.value == pytest.approx(np.mean([high[1][s] - low[1][s] for s in (1, 2)]))


def test_an_undefined_score_is_not_known():
    draws = {0: np.full(50, math.nan), 1: np.full(50, math.nan)}
    scores = {0: math.nan, 1: math.nan}
    found = bootstrap_difference(draws, draws, scores, scores)
    assert found.word == "not known"
    assert math.isnan(found.low)


def test_seeds_alone_are_a_paired_t_test():
    ours, theirs = {0: 0.80, 1: 0.83, 2: 0.84}, {0: 0.78, 1: 0.80, 2: 0.80}
    found = seeds_difference(ours, theirs)
    interval = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.basis == "seeds"
    welch = seeds_difference(ours, {7: 0.78, 8: 0.80, 9: 0.85})
    interval = stats.ttest_ind(
        list(ours.values()), [0.78, 0.80, 0.85], equal_var=False
    ).confidence_interval()
    assert (welch.low + welch.high) / 2 == pytest.approx((interval.low + interval.high) / 2)
    assert welch.low < interval.low < interval.high < welch.high
    assert seeds_difference({0: 0.8}, {0: 0.7}).word == "not known"
    assert seeds_difference({}, {0: 0.7}).word == "not known"


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.15), (3, 0.4), (5, 0.0), (2, 0.0)])
def test_intervals_hold_as_often_as_they_say(seeds, spread):
    """200 rows: 95 % intervals hold the true difference about that often, and are no wider."""
    held, widths, values = 0, [], []
    counts = np.concatenate(list(draw_counts(200, 200))) / 200
    for trial in range(200):
        rng = np.random.default_rng(trial)
        shared = rng.standard_normal(200)
        sides = []
        for shift in (0.3, 0.0):
            levels = shift + spread * rng.standard_normal(seeds)
            right = [level + shared + rng.standard_normal(200) > 0 for level in levels]
            draws = [counts @ r for r in right]
            sides.append((dict(enumerate(draws)), {s: r.mean() for s, r in enumerate(right)}))
        found = difference_of(*sides)
        unit = math.sqrt(2 + spread**2)
        truth = stats.norm.cdf(0.3 / unit) - stats.norm.cdf(0.0)
        held += found.low <= truth <= found.high
        widths.append((found.high - found.low) / 2)
        values.append(found.value)
    assert held / 200 >= 0.9
    reach = stats.t.ppf(0.975, seeds - 1) * np.std(values)
    assert np.median(widths) < 1.3 * reach


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize(("seeds", "comparisons"), [(2, 5), (3, 28), (5, 28)])
def test_all_intervals_of_a_table_hold_together_however_much_is_of_the_seeds(
    seeds, comparisons, ratio
):
    """No difference, noise of the examples, and ``ratio`` times as much of the seeds."""
    trials, wrong = 500, 0
    rng = np.random.default_rng(11)
    draws = rng.standard_normal(200)
    draws = (draws - draws.mean()) / draws.std(ddof=1)
    none = {s: np.zeros(200) for s in range(seeds)}
    for _ in range(trials):
        moved = rng.standard_normal() + math.sqrt(ratio * seeds) * rng.standard_normal(seeds)
        scores = dict(enumerate(moved.tolist()))
        found = bootstrap_difference(
            {s: score + draws for s, score in scores.items()}, none,
            scores, dict.fromkeys(scores, 0.0), comparisons=comparisons,
        )  # fmt: skip
        wrong += found.word in ("ahead", "behind")
    # 5 % of all together; what a count of so few can be by chance stays below in 999 of 1,000.
    assert wrong <= stats.binom.ppf(0.999, trials, 0.05 / comparisons)


def test_the_seeds_own_spread_is_counted_once():
    """Equal scores of all seeds but on other rows: their spread is what the examples make of it."""
    rows, seeds = 300, 8
    counts = np.concatenate(list(draw_counts(rows, 2000))) / rows
    rng = np.random.default_rng(5)
    right = [rng.random(rows) < 0.5 for _ in range(seeds)]
    row = {s: counts @ r for s, r in enumerate(right)}
    scores = {s: float(r.mean()) for s, r in enumerate(right)}
    none = {s: np.zeros(2000) for s in range(seeds)}
    found = bootstrap_difference(row, none, scores, dict.fromkeys(scores, 0.0))
    error = math.sqrt(0.25 / rows / seeds)
    reach = (found.high - found.low) / 2
    assert 1.5 * error < reach < 3.2 * error


def test_differences_that_agree_but_for_rounding_are_not_known():
    found = seeds_difference({0: 0.85, 1: 0.90}, {0: 0.80, 1: 0.85}, comparisons=20)
    assert found.word == "not known"


def test_every_metric_can_be_scored_on_resamples():
    """One that is added to the metrics alone would break the reports."""
    assert {kind: {*table} for kind, table in scorers._MAKERS.items()} == {
        kind: {*table} for kind, table in metrics._METRICS.items()
    }
