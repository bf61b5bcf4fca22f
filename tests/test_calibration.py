import math

import numpy as np
import pytest

from bitfit.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    expected_calibration_error,
    fit_temperature,
    probabilities,
)
from bitfit.errors import UsageError


def test_probabilities_are_a_softmax_of_scaled_logits() -> None:
    found = probabilities([[0.0, 2 * math.log(3)]], temperature=2)
    assert found == pytest.approx(np.array([[0.25, 0.75]]))
    assert probabilities([[1e5, -1e5]]).tolist() == [[1.0, 0.0]]


def test_multilabel_probabilities_are_sigmoids() -> None:
    found = probabilities([[0.0, math.log(3)]], multilabel=True)
    assert found == pytest.approx(np.array([[0.5, 0.75]]))


def test_temperature_by_hand() -> None:
    # Logit distance 2, right in 3 of 4 rows: likeliest at sigmoid(2 / T) = 3/4, T = 2 / ln 3.
    found = fit_temperature([[0.0, 2.0]] * 4, [1, 1, 1, 0])
    assert found == pytest.approx(2 / math.log(3), rel=1e-4)


def test_multilabel_temperature_by_hand() -> None:
    logits = np.array([[2.0, -2.0]] * 4)
    labels = np.array([[1, 0], [1, 0], [1, 0], [0, 1]])
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(3), rel=1e-4)


def test_temperature_recovers_a_known_scale_and_repeats_exactly() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    labels = np.array([rng.choice(3, p=row) for row in probabilities(logits)])
    found = fit_temperature(logits * 5, labels)
    assert found == pytest.approx(5, rel=0.1)
    assert fit_temperature(logits * 5, labels) == found


def test_temperature_stays_in_its_bounds() -> None:
    assert fit_temperature([[0.0, 0.5]] * 3, [1] * 3) == pytest.approx(MIN_TEMPERATURE, rel=1e-3)
    assert fit_temperature([[0.0, 0.5]] * 3, [0] * 3) == pytest.approx(MAX_TEMPERATURE, rel=1e-3)


def test_calibration_error_by_hand() -> None:
    # bin (0.6, 0.8]: confidence 0.8, right 1 of 2; bin (0.8, 1]: 0.9, right 2 of 2
    shares = [[0.8, 0.2], [0.2, 0.8], [0.9, 0.1], [0.1, 0.9]]
    found = expected_calibration_error(shares, [0, 0, 0, 1], bins=5)
    assert found == pytest.approx(0.5 * 0.3 + 0.5 * 0.1)


def test_calibration_error_of_multilabel_by_hand() -> None:
    # each label's own probability: 0.9 twice, right once; 0.1 twice, right once
    shares = [[0.9, 0.1], [0.9, 0.1]]
    assert expected_calibration_error(shares, [[1, 0], [0, 1]]) == pytest.approx(0.4)


def test_certain_and_right_has_no_error() -> None:
    assert expected_calibration_error([[1.0, 0.0], [0.0, 1.0]], [0, 1]) == 0.0


@pytest.mark.parametrize(
    ("logits", "labels"),
    [([[0.0, 1.0]], [2]), ([[0.0, math.nan]], [0]), ([], []), ([[0.0, 1.0]], [0, 1])],
)
def test_inputs_that_do_not_fit_are_refused(logits: list, labels: list) -> None:
    with pytest.raises(UsageError):
        fit_temperature(logits, labels)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="above 0"):
        probabilities([[1.0]], 0.0)
