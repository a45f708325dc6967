"""Intervals against DeLong in loops over pairs, a bootstrap over patients, and coverage."""

import numpy as np
import pytest
from jaxtyping import Float
from scipy.stats import norm

from ctfm.heads.intervals import (
    auc_intervals,
    clustered_error,
    delong_influence,
    logit_interval,
    macro_difference,
    newcombe_interval,
)
from ctfm.heads.metrics import auc_per_finding


def cohort(n: int, c: int, *, seed: int = 0) -> tuple[Float[np.ndarray, "n c"], ...]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, c)) < 0.3).astype(float)
    shared = rng.standard_normal((n, 1))
    return labels, (rng.standard_normal((n, c)) + shared + labels).round(1)


def kernel(positive: float, negative: float) -> float:
    return 1.0 if positive > negative else 0.5 if positive == negative else 0.0


def delong_by_loops(
    label: Float[np.ndarray, " n"], scores: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, "c c"]:
    """S10/m + S01/n of DeLong et al. 1988, Eq. 4 to 6, one pair at a time."""
    positive, negative = scores[label == 1], scores[label == 0]
    m, n, c = len(positive), len(negative), scores.shape[1]
    v10, v01 = np.zeros((m, c)), np.zeros((n, c))
    for k in range(c):
        for i in range(m):
            for j in range(n):
                won = kernel(positive[i, k], negative[j, k])
                v10[i, k] += won / n
                v01[j, k] += won / m
    s10, s01 = np.cov(v10, rowvar=False), np.cov(v01, rowvar=False)
    return np.asarray(s10 / m + s01 / n)


def test_influence_gives_delongs_variances_and_covariances() -> None:
    labels, scores = cohort(47, 3)
    labels = labels[:, [0, 0, 0]]
    auc, influence = delong_influence(labels, scores)
    expected = delong_by_loops(labels[:, 0], scores)
    np.testing.assert_allclose(influence.T @ influence, expected, rtol=1e-12)
    np.testing.assert_allclose(auc, auc_per_finding(labels, scores), rtol=1e-14)
    error = clustered_error(influence, np.arange(47))
    np.testing.assert_allclose(error, np.sqrt(np.diag(expected)), rtol=1e-12)


def test_unknown_labels_have_no_influence() -> None:
    labels, scores = cohort(61, 2)
    labels[::5, 1] = np.nan
    known = ~np.isnan(labels[:, 1])
    _, influence = delong_influence(labels, scores)
    _, expected = delong_influence(labels[known, 1:], scores[known, 1:])
    assert (influence[~known, 1] == 0).all()
    np.testing.assert_allclose(influence[known, 1], expected[:, 0])


def test_scans_that_are_copies_of_each_other_count_once() -> None:
    labels, scores = cohort(53, 4)
    doubled = np.repeat(labels, 3, axis=0), np.repeat(scores, 3, axis=0)
    _, influence = delong_influence(labels, scores)
    once = clustered_error(influence, np.arange(53))
    _, influence = delong_influence(*doubled)
    # m(m−1) grows a little less than threefold squared.
    np.testing.assert_allclose(clustered_error(influence, np.repeat(np.arange(53), 3)), once, 0.05)


def test_agrees_with_a_bootstrap_over_patients() -> None:
    rng = np.random.default_rng(7)
    n, c = 400, 5
    patient = rng.integers(0, 160, n)
    effect, illness = rng.standard_normal((160, c)), rng.random((160, c)) < 0.3
    labels = illness[patient].astype(float)
    scores = labels + effect[patient] + 0.5 * rng.standard_normal((n, c))
    _, influence = delong_influence(labels, scores)
    error = clustered_error(influence, patient)
    macro = clustered_error(influence.mean(axis=1, keepdims=True), patient)[0]
    rows_of = [np.flatnonzero(patient == one) for one in range(160)]
    drawn = []
    for _ in range(400):
        rows = np.concatenate([rows_of[one] for one in rng.integers(0, 160, 160)])
        drawn.append(auc_per_finding(labels[rows], scores[rows]))
    np.testing.assert_allclose(error, np.std(drawn, axis=0), rtol=0.2)
    assert macro == pytest.approx(np.std(np.mean(drawn, axis=1)), rel=0.2)
    assert (error > 1.2 * clustered_error(influence, np.arange(n))).all()


def test_a_difference_has_the_paired_error_of_delong() -> None:
    labels, scores = cohort(47, 2, seed=3)
    labels = labels[:, [0]]
    covariance = delong_by_loops(labels[:, 0], scores)
    patients = [str(i) for i in range(47)]
    found, low, high = macro_difference(labels, scores[:, [0]], scores[:, [1]], patients=patients)
    auc = auc_per_finding(labels[:, [0, 0]], scores)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found == pytest.approx(auc[1] - auc[0], abs=1e-14)
    assert (high - low) / 2 == pytest.approx(norm.ppf(0.975) * error)
    assert (low + high) / 2 == pytest.approx(found)


def test_a_difference_agrees_with_a_bootstrap_over_patients() -> None:
    rng = np.random.default_rng(8)
    n, c = 400, 4
    patient = rng.integers(0, 160, n)
    labels = (rng.random((160, c)) < 0.3)[patient].astype(float)
    shared = labels + rng.standard_normal((160, c))[patient] + 0.5 * rng.standard_normal((n, c))
    before, after = shared + rng.standard_normal((n, c)), shared + 0.5 * rng.standard_normal((n, c))
    rows_of = [np.flatnonzero(patient == one) for one in range(160)]
    drawn = []
    for _ in range(400):
        rows = np.concatenate([rows_of[one] for one in rng.integers(0, 160, 160)])
        aucs = [auc_per_finding(labels[rows], each[rows]).mean() for each in (before, after)]
        drawn.append(aucs[1] - aucs[0])
    _, low, high = macro_difference(labels, before, after, patients=patient)
    assert (high - low) / (2 * norm.ppf(0.975)) == pytest.approx(np.std(drawn), rel=0.2)
    same = macro_difference(labels, before, before, patients=patient)
    assert same == (0.0, 0.0, 0.0)


def test_newcombe_bounds_solve_his_equation() -> None:
    auc, m, n = np.array([0.62, 0.91, 0.985]), np.array([8.0, 30, 5]), np.array([40.0, 31, 700])
    z, n_star = norm.ppf(0.975), (m + n) / 2 - 1
    for bound in newcombe_interval(auc, m, n):
        q1 = bound / (2 - bound) - bound**2
        q2 = 2 * bound**2 / (1 + bound) - bound**2
        variance = (bound * (1 - bound) + n_star * (q1 + q2)) / (m * n)
        np.testing.assert_allclose(np.abs(bound - auc), z * np.sqrt(variance), rtol=1e-9)


def test_an_auc_of_0_or_1_has_an_interval_with_a_width() -> None:
    labels = np.array([1.0] * 6 + [0.0] * 23)[:, None]
    scores = np.arange(29.0, 0, -1)[:, None]
    best = auc_intervals(labels, scores, patients=np.arange(29))
    assert best.auc[0] == best.high[0] == best.macro_high == 1
    assert 0.5 < best.low[0] < 0.95
    assert best.macro_low == best.low[0]
    worst = auc_intervals(labels, -scores, patients=np.arange(29))
    assert worst.low[0] == 0
    np.testing.assert_allclose(worst.high, 1 - best.low, atol=1e-12)


def test_findings_without_a_wrong_pair_leave_the_macro_auc_a_width() -> None:
    labels = np.array([1.0] * 6 + [0.0] * 23)[:, None].repeat(2, axis=1)
    scores = np.arange(29.0, 0, -1)[:, None].repeat(2, axis=1)
    found = auc_intervals(labels, scores, patients=np.arange(29))
    assert found.macro_auc == 1
    assert found.macro_low == found.low[0] < 0.95


def test_more_scans_of_the_same_patients_do_not_narrow_the_interval() -> None:
    labels, scores = cohort(40, 3)
    once = auc_intervals(labels, scores, patients=np.arange(40))
    copied = auc_intervals(
        labels.repeat(5, axis=0), scores.repeat(5, axis=0), patients=np.arange(40).repeat(5)
    )
    np.testing.assert_allclose(copied.high - copied.low, once.high - once.low, rtol=0.06)
    few, best = (np.arange(40) < 6).astype(float)[:, None], -np.arange(40.0)[:, None]
    once = auc_intervals(few, best, patients=np.arange(40))
    copied = auc_intervals(
        few.repeat(5, axis=0), best.repeat(5, axis=0), patients=np.arange(40).repeat(5)
    )
    assert copied.low[0] == once.low[0]


def test_logit_interval_stays_inside_and_holds_the_auc() -> None:
    auc = np.array([0.5, 0.97, 0.999])
    low, high = logit_interval(auc, np.array([0.3, 0.2, 0.1]))
    assert ((low >= 0) & (low < auc) & (auc < high) & (high <= 1)).all()


def test_what_is_not_estimable_is_in_no_mean() -> None:
    labels, scores = cohort(70, 3)
    labels[:, 1] = 0
    found = auc_intervals(labels, scores, patients=[f"p{i}" for i in range(70)])
    assert np.isnan([found.auc[1], found.low[1], found.high[1]]).all()
    assert found.macro_auc == pytest.approx(found.auc[[0, 2]].mean())
    without = auc_intervals(labels[:, [0, 2]], scores[:, [0, 2]], patients=np.arange(70))
    assert (found.macro_low, found.macro_high) == pytest.approx(
        (without.macro_low, without.macro_high)
    )


def test_nothing_estimable_gives_no_macro_auc() -> None:
    found = auc_intervals(np.zeros((8, 2)), np.zeros((8, 2)), patients=np.arange(8))
    assert np.isnan([found.macro_auc, found.macro_low, found.macro_high]).all()


def test_dependent_findings_leave_the_macro_auc_less_certain() -> None:
    labels, scores = cohort(300, 6)
    labels = labels[:, [0] * 6]
    same = auc_intervals(labels, scores[:, [0] * 6], patients=np.arange(300))
    rng = np.random.default_rng(2)
    apart = scores + 3 * rng.standard_normal(scores.shape)
    other = auc_intervals(labels, apart, patients=np.arange(300))
    assert same.macro_high - same.macro_low > 1.3 * (other.macro_high - other.macro_low)
    low, high = logit_interval(
        same.auc[:1],
        clustered_error(delong_influence(labels, scores[:, [0] * 6])[1], np.arange(300))[:1],
    )
    assert (same.macro_low, same.macro_high) == pytest.approx((low[0], high[0]))


@pytest.mark.parametrize("auc", [0.9, 0.98])
@pytest.mark.parametrize("positives", [5, 20])
def test_intervals_hold_the_truth_at_least_as_often_as_they_say(auc: float, positives: int) -> None:
    rng = np.random.default_rng(11)
    n, repeats = 200, 600
    labels = np.zeros((n, repeats))
    labels[:positives] = 1
    scores = rng.standard_normal((n, repeats)) + np.sqrt(2) * norm.ppf(auc) * labels
    found = auc_intervals(labels, scores, patients=np.arange(n))
    assert ((found.low <= auc) & (auc <= found.high)).mean() >= 0.94
