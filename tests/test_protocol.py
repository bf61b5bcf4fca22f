"""Choosing epoch and rate on dev."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfit.errors import BitfitError
from bitfit.experiments.protocol import (
    best_place,
    choose,
    choose_rate,
    halves,
    paper_scores,
    split_scores,
)

TASK = {
    "name": "toy", "kind": "classification", "labels": ["no", "yes"], "metrics": ["accuracy"],
    "is_pair": False,
}  # fmt: skip


def record(scores, *, rate=1e-3, seed=0, row="BitFit", state="done"):
    return {
        "id": f"{row}-{rate}-{seed}", "state": state, "row": row, "base": "minilm", "task": TASK,
        "train_rows": None, "metric": "accuracy",
        "config": {"learning_rate": rate, "seed": seed},
        "history": [{"epoch": i + 1, "dev": {"accuracy": s}} for i, s in enumerate(scores)],
    }  # fmt: skip


def test_the_best_epoch_is_the_later_of_equals_and_an_undefined_score_is_the_least():
    assert best_place([0.5, 0.7, 0.7, 0.6]) == 2
    assert best_place([math.nan, 0.1]) == 1
    assert best_place([math.nan, math.nan]) == 1


def test_the_paper_reports_the_best_epoch_of_the_best_rate_on_the_rows_that_chose_it():
    runs = [record([0.5, 0.8, 0.6], rate=1e-3), record([0.7, 0.7, 0.9], rate=1e-4)]
    (choice,) = choose(runs, paper_scores)["BitFit", "minilm", "toy", None]
    assert (choice.record["config"]["learning_rate"], choice.epoch, choice.score) == (1e-4, 3, 0.9)


def test_a_rate_is_chosen_by_its_mean_over_the_seeds_that_all_rates_have():
    runs = [
        record([0.9], rate=1e-3, seed=0), record([0.5], rate=1e-3, seed=1),
        record([0.8], rate=1e-4, seed=0), record([0.8], rate=1e-4, seed=1),
        record([0.1], rate=1e-4, seed=2),
    ]  # fmt: skip
    assert choose_rate((r, paper_scores(r)) for r in runs) == 1e-4
    seeds = [c.record["config"]["seed"] for c in choose(runs, paper_scores).popitem()[1]]
    assert seeds == [0, 1, 2]


def test_of_equal_rates_the_smallest_is_chosen_and_failed_runs_do_not_count():
    runs = [record([0.8], rate=rate) for rate in (1e-3, 4e-4, 1e-4)]
    assert choose_rate((r, paper_scores(r)) for r in runs) == 1e-4
    runs.append(record([0.7], rate=1e-4, seed=1))  # repeated, and lower there
    assert choose_rate((r, paper_scores(r)) for r in runs) == 1e-4
    runs.append(record([0.99], rate=1e-5, state="failed"))
    assert choose(runs, paper_scores).popitem()[1][0].record["config"]["learning_rate"] == 1e-4


def test_a_rate_that_mostly_diverges_does_not_win_by_the_run_that_did_not():
    runs = [record([0.8], rate=1e-4, seed=seed) for seed in range(3)]
    runs += [record([0.81], rate=1e-3, seed=0)]
    runs += [record([], rate=1e-3, seed=seed, state="failed") for seed in (1, 2)]
    chosen = choose(runs, paper_scores).popitem()[1]
    assert [c.record["config"]["learning_rate"] for c in chosen] == [1e-4] * 3
    runs.append(record([], rate=1e-4, seed=3, state="failed"))
    runs.append(record([0.81], rate=1e-3, seed=3))
    rates = {c.record["config"]["learning_rate"] for c in choose(runs, paper_scores).popitem()[1]}
    assert rates == {1e-3}  # all have failed runs: by those that ended


def test_split_chooses_on_one_half_and_reports_on_the_other():
    answers = [1] * 10
    choosing, reporting = halves(10)
    good_where_it_chooses = [1 if i in choosing else 0 for i in range(10)]
    good_where_it_reports = [1 if i in reporting else 0 for i in range(10)]
    found = split_scores(
        record([0.5, 0.5]), {"dev": [good_where_it_chooses, good_where_it_reports]}, answers
    )
    assert found.choosing == [1.0, 0.0]
    assert found.reporting == [0.0, 1.0]
    assert found.best == 0
    assert split_scores(record([0.5]), None, answers) is None
    assert split_scores(record([0.5]), {"dev": [[1] * 10]}, None) is None


@pytest.mark.parametrize("dev", [[], [[1] * 10, [1] * 10], [[1] * 9], [[1] * 11]])
def test_predictions_of_other_epochs_or_rows_are_refused(dev):
    with pytest.raises(BitfitError, match=r"BitFit-0\.001-0: its predictions are not those of 1 "):
        split_scores(record([0.5]), {"dev": dev}, [1] * 10)


@given(st.integers(2, 3000))
def test_the_halves_of_dev_are_disjoint_and_whole_and_always_the_same(rows):
    choosing, reporting = halves(rows)
    assert sorted([*choosing, *reporting]) == list(range(rows))
    assert abs(len(choosing) - len(reporting)) <= 1
    halves.cache_clear()
    assert np.array_equal(choosing, halves(rows)[0])
