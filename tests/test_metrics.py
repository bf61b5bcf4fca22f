import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk

from bitfit.errors import UsageError
from bitfit.metrics import (
    compute_metrics,
    majority_score,
    matthews,
    normalize_answer,
    pearson,
    spearman,
    squad_exact_match,
    squad_f1,
)
from bitfit.tasks import BUILTIN_TASKS, Kind, Task

ALL_CLASS = ("accuracy", "f1_macro", "f1_micro", "matthews")


def task(kind: Kind, *metrics: str, labels: tuple[str, ...] = ("a", "b", "c")) -> Task:
    return Task(
        name="t",
        kind=kind,
        metrics=metrics,
        labels=() if kind in ("regression", "span") else labels,
    )


def test_binary_scores_by_hand() -> None:
    # TP 2, FP 1, FN 1, TN 2: F1 = 2*2/(4+1+1), MCC = (2*2-1*1)/sqrt(3*3*3*3)
    binary = task("classification", "f1", "accuracy", "matthews", labels=("0", "1"))
    scores = compute_metrics(binary, [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0])
    assert scores == pytest.approx({"f1": 2 / 3, "accuracy": 4 / 6, "matthews": 3 / 9})
    assert list(scores) == ["f1", "accuracy", "matthews"]


def test_f1_counts_the_label_with_index_one_as_positive() -> None:
    binary = task("classification", "f1", labels=("yes", "no"))
    assert compute_metrics(binary, [0, 0], [0, 0]) == {"f1": 0.0}
    assert compute_metrics(binary, [1, 1], [1, 1]) == {"f1": 1.0}


def test_f1_of_three_labels_is_refused() -> None:
    with pytest.raises(UsageError, match="f1_macro"):
        compute_metrics(task("classification", "f1"), [0], [0])


def test_macro_f1_by_hand() -> None:
    # class 0: 2*1/(1+2); class 1: 2*1/(2+1); class 2 in neither: left out
    scores = compute_metrics(task("classification", "f1_macro"), [0, 1, 1], [0, 0, 1])
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_class_scores_agree_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, truth = (np.array(side) for side in zip(*pairs, strict=True))
    scores = compute_metrics(task("classification", *ALL_CLASS), predicted, truth)
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert scores["f1_micro"] == pytest.approx(sk.f1_score(truth, predicted, average="micro"))
    macro = sk.f1_score(truth, predicted, average="macro", zero_division=0)
    assert scores["f1_macro"] == pytest.approx(macro)
    if len(np.union1d(truth, predicted)) > 1:
        assert scores["matthews"] == pytest.approx(sk.matthews_corrcoef(truth, predicted))


def test_matthews_of_a_constant_side_is_zero() -> None:
    assert matthews(np.array([1, 1, 1]), np.array([0, 1, 1])) == 0.0
    assert matthews(np.array([1, 1]), np.array([1, 1])) == 0.0


def test_multilabel_scores_by_hand() -> None:
    # rows {a,b}|{a}, {}|{}, {c}|{b,c}: TP 2, predicted 3, true 3
    scores = compute_metrics(
        task("multilabel", "f1_micro", "f1_macro", "subset_accuracy"),
        [(0, 1), (), (2,)],
        [(0,), (), (1, 2)],
    )
    assert scores["f1_micro"] == pytest.approx(4 / 6)
    assert scores["f1_macro"] == pytest.approx((1 + 0 + 1) / 3)
    assert scores["subset_accuracy"] == pytest.approx(1 / 3)


@settings(max_examples=25, deadline=None)
@given(arrays(np.int64, (6, 3), elements=st.integers(0, 1)), st.integers(0, 2**18 - 1))
def test_multilabel_scores_agree_with_scikit_learn(truth: np.ndarray, bits: int) -> None:
    predicted = np.array([bits >> i & 1 for i in range(18)]).reshape(6, 3)
    names = ("f1_micro", "f1_macro", "subset_accuracy")
    scores = compute_metrics(task("multilabel", *names), predicted, truth)
    for average in ("micro", "macro"):
        expected = sk.f1_score(truth, predicted, average=average, zero_division=0)
        assert scores[f"f1_{average}"] == pytest.approx(expected)
    assert scores["subset_accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))


def test_correlations_by_hand() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert pearson(x, y) == pytest.approx(0.8)
    assert spearman(x, y**3) == pytest.approx(0.8)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    # ranks with a tie: 1.5 1.5 3 against 1 2 3
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)


@pytest.mark.parametrize(
    ("predicted", "truth"),
    [([2.5, 2.5, 2.5], [1, 2, 3]), ([1.0], [1.0]), ([0.1] * 7, range(7)), ([1, 2], [3, 3])],
)
def test_an_undefined_correlation_is_nan(predicted: list[float], truth: list[float]) -> None:
    scores = compute_metrics(task("regression"), predicted, truth)
    assert all(math.isnan(score) for score in scores.values())


@given(
    st.lists(
        st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 2), min_size=0, max_size=6
    )
)
def test_correlations_of_any_floats_are_in_range_or_nan(pairs: list[tuple[float, float]]) -> None:
    x, y = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    for score in (pearson(x, y), spearman(x, y)):
        assert math.isnan(score) or -1 <= score <= 1


def test_a_word_that_was_cut_off_counts_as_wrong() -> None:
    scores = compute_metrics(task("tokens", "accuracy"), [[0, 1, -1], [2]], [(0, 1, 1), (0,)])
    assert scores == {"accuracy": 0.5}


def test_a_cut_off_word_is_no_class_of_its_own_in_macro_f1() -> None:
    scores = compute_metrics(task("tokens", "f1_macro"), [[0, -1]], [[0, 0]])
    assert scores["f1_macro"] == pytest.approx(2 / 3)


def test_tokens_of_another_number_are_refused() -> None:
    with pytest.raises(UsageError, match="cut off"):
        compute_metrics(task("tokens"), [[0, 1]], [[0, 1, 1]])


def test_squad_answers_are_normalised_as_officially() -> None:
    assert normalize_answer("The  Eiffel-Tower, a (tall) one!") == "eiffeltower tall one"
    assert normalize_answer("An apple a day — the rule") == "apple day — rule"
    assert normalize_answer("the") == ""


@pytest.mark.parametrize(
    ("prediction", "answer", "f1", "exact"),
    [
        ("The Broncos", "broncos.", 1.0, 1.0),
        ("Denver Broncos", "Denver Broncos team", 0.8, 0.0),
        ("to to be", "to be be", 2 / 3, 0.0),
        ("cat", "dog", 0.0, 0.0),
        ("the", "a", 0.0, 1.0),  # nothing left of both: no shared word, yet equal
    ],
)
def test_squad_scores_by_hand(prediction: str, answer: str, f1: float, exact: float) -> None:
    assert squad_f1(prediction, answer) == pytest.approx(f1)
    assert squad_exact_match(prediction, answer) == exact


@pytest.mark.parametrize(
    ("prediction", "answer", "f1", "exact"),
    [
        # articles go wherever they stand, alone: "a" of "Ana" and "an" of "anthem" stay
        ("Ana sang an anthem", "ana sang the anthem", 1.0, 1.0),
        ("the the the cat", "cat", 1.0, 1.0),
        # punctuation goes before articles, so "a.m." is "am" and no article is left; "the-end" and
        # "U.S." become one word each
        ("at 9 a.m.", "at 9 am", 1.0, 1.0),
        ("the-end", "the end", 0.0, 0.0),
        ("U.S.", "us", 1.0, 1.0),
        ("$1,000", "1000", 1.0, 1.0),
        # only ASCII punctuation goes: the dash stays in its word, the apostrophe is another one
        ("1990–95", "1990-95", 0.0, 0.0),
        ("the king’s men", "king's men", 2 * 1 / (2 + 2), 0.0),
        # letters of other scripts are lower-cased, not unaccented; an article is one between
        # word boundaries, which accents are no part of
        ("ÉCOLE Normale", "école normale", 1.0, 1.0),
        ("ecole normale", "école normale", 0.5, 0.0),
        ("à la carte", "la carte", 2 * 2 / (3 + 2), 0.0),
        # white space of any kind is one blank
        ("two\u00a0 words\t", "two words", 1.0, 1.0),
        # shared words count as often as both have them: 2 of 3 and 2 of 4
        ("new new york", "new york new jersey", 2 * 3 / (3 + 4), 0.0),
        ("new new new", "new york new jersey", 2 * 2 / (3 + 4), 0.0),
        # words in another order share all, and are not the same answer
        ("york new", "new york", 1.0, 0.0),
        # nothing said
        ("", "york", 0.0, 0.0),
        ("", "the", 0.0, 1.0),
    ],
)
def test_squad_scores_of_articles_punctuation_and_other_scripts_by_hand(
    prediction: str, answer: str, f1: float, exact: float
) -> None:
    assert squad_f1(prediction, answer) == pytest.approx(f1)
    assert squad_exact_match(prediction, answer) == exact


def test_squad_scores_of_a_small_set_by_hand() -> None:
    references = [
        [(177, "Denver Broncos"), (177, "The Denver Broncos"), (184, "Broncos")],
        [(403, "Santa Clara, California"), (355, "Levi's Stadium")],
        [(0, "gold"), (0, "gold"), (9, "the color gold")],
        [(5, "February 7, 2016"), (5, "February 7")],
        [(1, "24–10")],
    ]
    predictions = ["broncos", "Levi's Stadium in Santa Clara", "", "on February 7", None]
    # 1: the third answer, whole. 2: the second, 2 of 5 and of 2 words: 4/7, the first, 2 of 5
    # and of 3: 4/8. 3: said nothing. 4: 2 of 3 and of 2 words: 4/5. 5: not answered, which counts.
    scores = compute_metrics(task("span"), predictions, references)
    assert scores["exact_match"] == pytest.approx(1 / 5)
    assert scores["f1"] == pytest.approx((1 + 4 / 7 + 0 + 4 / 5 + 0) / 5)


def test_squad_takes_the_best_answer_and_scores_a_missing_one_zero() -> None:
    references = [((0, "red"), (9, "dark red")), ((3, "blue"),)]
    scores = compute_metrics(task("span"), ["dark red", None], references)
    assert scores == {"f1": 0.5, "exact_match": 0.5}


def test_a_question_without_answers_is_refused() -> None:
    with pytest.raises(UsageError, match="question 1 has no accepted answer"):
        compute_metrics(task("span"), ["x", "y"], [["x"], []])


@pytest.mark.parametrize("name", sorted(BUILTIN_TASKS))
def test_no_rows_score_nan(name: str) -> None:
    scores = compute_metrics(BUILTIN_TASKS[name].task, [], [])
    assert set(scores) == set(BUILTIN_TASKS[name].task.metrics)
    assert all(math.isnan(score) for score in scores.values())


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match="1 predictions for 2 references"):
        compute_metrics(task("classification"), [0], [0, 1])


def test_a_metric_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="regression has no metric 'accuracy'"):
        compute_metrics(task("regression", "accuracy"), [0.0], [0.0])


def test_majority_of_mrpc_is_always_yes() -> None:
    scores = majority_score(BUILTIN_TASKS["mrpc"].task, [1, 1, 1, 0])
    assert scores == pytest.approx({"f1": 6 / 7, "accuracy": 0.75})


def test_the_bar_of_a_binary_f1_is_the_class_that_it_counts() -> None:
    """QQP: 63 % are no duplicates, and always saying "duplicate" has an F1 far from zero."""
    scores = majority_score(BUILTIN_TASKS["qqp"].task, [0] * 63 + [1] * 37)
    assert scores["accuracy"] == pytest.approx(0.63)
    assert scores["f1"] == pytest.approx(2 * 0.37 / 1.37)


def test_majority_by_kind() -> None:
    assert majority_score(task("tokens"), [(0, 1), (1,)])["accuracy"] == pytest.approx(2 / 3)
    assert majority_score(task("span"), [["x"]]) == {}
    assert all(math.isnan(v) for v in majority_score(task("regression"), [1.0, 2.5]).values())
    labels = majority_score(task("multilabel"), [(0,), (0, 1), (0, 1), ()])
    assert labels["subset_accuracy"] == 0.25
    assert majority_score(task("classification"), []) == {}
