"""AUC and average precision against scikit-learn and against counting every pair."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import Float
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from ctfm.heads.metrics import (
    auc_per_finding,
    average_precision_per_finding,
    roc_curve,
    youden_threshold,
)

N, C = 211, 7

Matrix = Float[np.ndarray, "n c"]
Metric = Callable[..., Float[np.ndarray, " c"]]


@pytest.fixture
def labels() -> Matrix:
    rng = np.random.default_rng(3)
    labels = (rng.random((N, C)) < np.linspace(0.05, 0.5, C)).astype(float)
    labels[rng.random((N, C)) < 0.1] = np.nan
    return labels


@pytest.fixture
def scores(labels: Matrix) -> Matrix:
    rng = np.random.default_rng(4)
    scores: Matrix = rng.standard_normal((N, C)) + np.nan_to_num(labels)
    scores[:, ::2] = scores[:, ::2].round(1)  # ties
    return scores


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (auc_per_finding, roc_auc_score),
        (average_precision_per_finding, average_precision_score),
    ],
)
def test_equals_scikit_learn_with_ties_and_unknown_labels(
    ours: Metric, theirs: Callable[..., float], labels: Matrix, scores: Matrix
) -> None:
    found = ours(labels, scores)
    for c in range(C):
        known = ~np.isnan(labels[:, c])
        assert abs(found[c] - theirs(labels[known, c], scores[known, c])) < 1e-12


@pytest.mark.parametrize("of", [auc_per_finding, average_precision_per_finding])
def test_variants_at_once_have_what_each_has_alone(
    of: Metric, labels: Matrix, scores: Matrix
) -> None:
    variants = np.stack([scores, -scores, scores.round()])
    together = of(labels, variants[None], min_positives=20)
    assert together.shape == (1, 3, C)
    for v in range(3):
        np.testing.assert_array_equal(together[0, v], of(labels, variants[v], min_positives=20))
    assert np.isnan(together).any()


@given(
    label=hnp.arrays(np.float64, 12, elements=st.sampled_from([0.0, 1.0, np.nan])),
    score=hnp.arrays(np.float32, 12, elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, np.inf])),
)
def test_auc_is_the_share_of_pairs_in_order(
    label: Float[np.ndarray, " n"], score: Float[np.ndarray, " n"]
) -> None:
    found = auc_per_finding(label[:, None], score[:, None])[0]
    pairs = [
        1.0 if p > q else 0.5 if p == q else 0.0
        for p in score[label == 1]
        for q in score[label == 0]
    ]
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


def test_depends_on_the_order_of_scores_alone(labels: Matrix, scores: Matrix) -> None:
    assert np.array_equal(auc_per_finding(labels, scores), auc_per_finding(labels, 3 * scores - 7))


@pytest.mark.parametrize("of", [auc_per_finding, average_precision_per_finding])
@pytest.mark.parametrize("flip", [False, True])
def test_too_few_positives_or_negatives_are_not_estimable(of: Metric, flip: bool) -> None:
    labels = np.zeros((9, 4))
    for c in range(4):
        labels[:c, c] = 1
    labels = 1 - labels if flip else labels
    found = of(labels, np.arange(36.0).reshape(9, 4), min_positives=2)
    assert np.isnan(found).tolist() == [True, True, False, False]


def test_a_score_that_is_no_number_makes_its_finding_not_estimable() -> None:
    labels = np.array([[1.0, 1.0], [0.0, np.nan], [0.0, 0.0]])
    scores = np.array([[1.0, 1.0], [np.nan, np.nan], [0.0, 0.0]])
    found = auc_per_finding(labels, scores)
    assert np.isnan(found[0])
    assert found[1] == 1


def test_no_scan_and_no_finding_are_fine() -> None:
    assert np.isnan(auc_per_finding(np.empty((0, 3)), np.empty((0, 3)))).all()
    assert auc_per_finding(np.empty((5, 0)), np.empty((5, 0))).shape == (0,)


def test_roc_curve_holds_the_corners_that_scikit_learn_finds(
    labels: Matrix, scores: Matrix
) -> None:
    for c in range(C):
        known = ~np.isnan(labels[:, c])
        expected = sklearn_roc_curve(labels[known, c], scores[known, c])[:2]
        false_rate, true_rate = roc_curve(labels[:, c], scores[:, c], max_points=10_000)
        np.testing.assert_allclose(np.interp(expected[0], false_rate, false_rate), expected[0])
        area = np.trapezoid(true_rate, false_rate)
        assert area == pytest.approx(auc_per_finding(labels, scores)[c], abs=1e-12)


def test_roc_curve_is_thinned_and_keeps_its_ends() -> None:
    rng = np.random.default_rng(0)
    labels, scores = (rng.random(5000) < 0.4).astype(float), rng.standard_normal(5000)
    false_rate, true_rate = roc_curve(labels, scores, max_points=50)
    assert false_rate.size <= 50
    assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
    assert (np.diff(false_rate) >= 0).all()
    assert (np.diff(true_rate) >= 0).all()


def test_roc_curve_of_one_class_is_empty() -> None:
    assert roc_curve(np.ones(4), np.arange(4.0))[0].size == 0


def test_youden_threshold_separates_what_can_be_separated() -> None:
    labels, scores = np.array([0.0, 0, 1, 1, np.nan]), np.array([0.0, 1, 3, 4, 9])
    assert youden_threshold(labels, scores) == 2


def test_youden_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(5)
    labels = (rng.random(90) < 0.3).astype(float)
    scores = (rng.standard_normal(90) + labels).round(1)

    def youden(at: float) -> float:
        return float((scores[labels == 1] >= at).mean() - (scores[labels == 0] >= at).mean())

    best = max(youden(at) for at in scores)
    assert youden(youden_threshold(labels, scores)) == pytest.approx(best)


def test_youden_threshold_of_one_class_is_no_number() -> None:
    assert np.isnan(youden_threshold(np.zeros(4), np.arange(4.0)))


NEXT = np.nextafter(1.0, 2.0)


@pytest.mark.parametrize(
    ("negative", "positive", "threshold"),
    [
        (1.0, NEXT, NEXT),  # no number lies between them: half of their sum is the lower
        (0.0, 5e-324, 5e-324),
        (-np.inf, 1.0, 1.0),
        (-np.inf, np.inf, np.inf),
        (1.0, np.inf, np.inf),
        (1.5e308, 1.7e308, 1.6e308),  # their sum is infinite
        (-1.0, 1.0, 0.0),
    ],
)
def test_youden_threshold_parts_scores_without_room_between_them(
    negative: float, positive: float, threshold: float
) -> None:
    chosen = youden_threshold(np.array([0.0, 1.0]), np.array([negative, positive]))
    assert chosen == threshold
    assert negative < chosen <= positive
