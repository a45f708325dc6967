"""Sampling error of AUCs: labels, scores and patients, to confidence intervals.

Each scan's share in the error of an AUC is its DeLong component (DeLong et al. 1988), kept as one
row of an influence matrix. Everything else is sums of its rows: a finding's standard error, one
that lets the scans of a patient depend on each other (Obuchowski 1997), and that of the macro AUC
with all correlations between findings. Few positives, or an AUC near 1, make those too narrow; so
a finding gets the wider of the logit-DeLong interval and Newcombe's (2006, part 2, method 5).

Nothing here resamples. Axes: n scans, c findings, g patients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.sparse import csr_array
from scipy.special import expit, logit
from scipy.stats import norm

from ctfm.heads.metrics import Labels, Scores, estimable, pairs_won


@dataclass(frozen=True, kw_only=True, eq=False)
class AucInterval:
    """AUC of each finding with its interval, and of their mean."""

    auc: Float[np.ndarray, " c"]
    """NaN where the finding is not estimable."""

    low: Float[np.ndarray, " c"]
    high: Float[np.ndarray, " c"]

    macro_auc: float
    """Mean over the estimable findings; NaN without any."""

    macro_low: float
    macro_high: float


def auc_intervals(
    labels: Labels,
    scores: Scores,
    *,
    patients: Sequence[str] | Shaped[np.ndarray, " n"],
    min_positives: int = 1,
    confidence: float = 0.95,
) -> AucInterval:
    """AUCs with intervals that let the scans of one patient depend on each other.

    Args:
        labels: 1, 0 or NaN for unknown.
        scores: Higher for more likely.
        patients: Whose scan each row is.
        min_positives: Fewest positives, and fewest negatives, that make a finding estimable.
        confidence: Share of intervals that shall hold the truth.
    """
    group = _group_numbers(patients)
    auc, influence = delong_influence(labels, scores, min_positives=min_positives)
    error = clustered_error(influence, group)
    positives = _patients_with(labels == 1, group)
    negatives = _patients_with(labels == 0, group)
    low, high = wider_interval(
        logit_interval(auc, error, confidence=confidence),
        newcombe_interval(auc, positives, negatives, confidence=confidence),
    )
    macro_auc, macro_low, macro_high = _macro(
        auc, influence, group=group, bounds=(low, high), confidence=confidence
    )
    return AucInterval(
        auc=auc,
        low=low,
        high=high,
        macro_auc=macro_auc,
        macro_low=macro_low,
        macro_high=macro_high,
    )


def macro_difference(
    labels: Labels,
    before: Scores,
    after: Scores,
    *,
    patients: Sequence[str] | Shaped[np.ndarray, " n"],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """How much two scores of the same scans differ in macro AUC, with a paired interval.

    Args:
        labels: 1, 0 or NaN for unknown; every finding has both.
        before: Scores to compare with.
        after: Scores to judge.
        patients: Whose scan each row is.
        confidence: Share of intervals that shall hold the truth.

    Returns:
        Macro AUC of `after` less that of `before`, and the ends of its interval, which is
        symmetric: a difference of means over findings has no bound nearby. All NaN without any
        finding.
    """
    if labels.shape[1] == 0:
        return np.nan, np.nan, np.nan
    aucs, influences = zip(
        *(delong_influence(labels, scores) for scores in (before, after)), strict=True
    )
    difference = float((aucs[1] - aucs[0]).mean())
    share = (influences[1] - influences[0]).mean(axis=1, keepdims=True)
    error = float(clustered_error(share, _group_numbers(patients))[0])
    half = float(norm.ppf((1 + confidence) / 2)) * error
    return difference, difference - half, difference + half


def delong_influence(
    labels: Labels, scores: Scores, *, min_positives: int = 1
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, "n c"]]:
    """Each scan's share in the error of each AUC.

    With V₁₀ of a positive the share of negatives below it, and V₀₁ of a negative the share of
    positives above it (ties half), row i of finding c is (V₁₀ − AUC) / √(m(m−1)) or
    (V₀₁ − AUC) / √(n(n−1)). So the sum of squares of a column is DeLong's variance, and the
    product of two columns DeLong's covariance when both findings are known for the same scans.

    Returns:
        The AUCs, and the matrix: 0 where a label is unknown, NaN columns where not estimable.
    """
    auc = np.full(labels.shape[1], np.nan)
    influence = np.full(labels.shape, np.nan)
    for c, positive, negative in estimable(labels, scores, min_positives=min_positives):
        m, n = positive.size, negative.size
        score, label = scores[:, c], labels[:, c]
        won = pairs_won(score[label == 1], negative) / (2 * n)
        lost = 1 - pairs_won(score[label == 0], positive) / (2 * m)
        auc[c] = won.mean()
        influence[:, c] = 0
        influence[label == 1, c] = (won - auc[c]) / np.sqrt(max(m * (m - 1), 1))
        influence[label == 0, c] = (lost - auc[c]) / np.sqrt(max(n * (n - 1), 1))
    return auc, influence


def clustered_error(
    influence: Float[np.ndarray, "n c"], group: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " c"]:
    """Standard error of each column's sum when rows of one group may depend on each other.

    Args:
        influence: From `delong_influence`.
        group: Number of the patient of each row, 0 to g−1. All different gives DeLong's error.
    """
    return np.asarray(np.linalg.norm(_sum_by_group(influence, group), axis=0))


def logit_interval(
    auc: Float[np.ndarray, " c"], error: Float[np.ndarray, " c"], *, confidence: float = 0.95
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Symmetric on the logit scale, so inside 0..1; of no width where the error is 0."""
    z = norm.ppf((1 + confidence) / 2)
    inside = (auc > 0) & (auc < 1)
    centre = logit(np.where(inside, auc, 0.5))
    half = np.where(inside, z * error / np.where(inside, auc * (1 - auc), 1), 0)
    low, high = expit(centre - half), expit(centre + half)
    return np.where(inside, low, auc), np.where(inside, high, auc)


def newcombe_interval(
    auc: Float[np.ndarray, " c"],
    positives: Float[np.ndarray, " c"],
    negatives: Float[np.ndarray, " c"],
    *,
    confidence: float = 0.95,
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Newcombe's method 5: the θ whose own Hanley-McNeil error just reaches the AUC.

    |θ − AUC| = z √V(θ), with V(θ) = θ(1−θ) [1 + N(1−θ)/(2−θ) + Nθ/(1+θ)] / (mn) and
    N = (m+n)/2 − 1. It has a width also at an AUC of 0 or 1.

    Args:
        auc: AUCs; NaN gives NaN.
        positives: Independent positives m.
        negatives: Independent negatives n.
        confidence: Share of intervals that shall hold the truth.
    """
    z = norm.ppf((1 + confidence) / 2)
    n_star = (positives + negatives) / 2 - 1

    def outside(theta: Float[np.ndarray, " c"]) -> Bool[np.ndarray, " c"]:
        spread = 1 + n_star * (1 - theta) / (2 - theta) + n_star * theta / (1 + theta)
        variance = theta * (1 - theta) * spread / np.maximum(positives * negatives, 1)
        return np.asarray((theta - auc) ** 2 > z**2 * variance)

    zero, one = np.zeros_like(auc), np.ones_like(auc)
    return _edge(outside, start=zero, end=auc), _edge(outside, start=one, end=auc)


def wider_interval(
    one: tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]],
    other: tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]],
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Of two intervals the wider, finding by finding."""
    first = one[1] - one[0] >= other[1] - other[0]
    return np.where(first, one[0], other[0]), np.where(first, one[1], other[1])


def _edge(
    outside: Callable[[Float[np.ndarray, " c"]], Bool[np.ndarray, " c"]],
    *,
    start: Float[np.ndarray, " c"],
    end: Float[np.ndarray, " c"],
) -> Float[np.ndarray, " c"]:
    """Where, on the way from `start` to `end`, `outside` turns False, by bisection."""
    for _ in range(60):
        middle = (start + end) / 2
        still = outside(middle)
        start, end = np.where(still, middle, start), np.where(still, end, middle)
    return np.where(np.isnan(end), np.nan, (start + end) / 2)


def _macro(
    auc: Float[np.ndarray, " c"],
    influence: Float[np.ndarray, "n c"],
    *,
    group: Int[np.ndarray, " n"],
    bounds: tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]],
    confidence: float,
) -> tuple[float, float, float]:
    """Mean AUC of the estimable findings, with the interval that its scans give it."""
    used = ~np.isnan(auc)
    if not used.any():
        return np.nan, np.nan, np.nan
    mean = auc[used].mean(keepdims=True)
    error = clustered_error(influence[:, used].mean(axis=1, keepdims=True), group)
    # Without any wrong pair the influence is 0 and knows nothing of the sampling error; and one
    # finding is no mean. The mean of the findings' own bounds then never claims too much.
    if error[0] == 0 or used.sum() == 1:
        return float(mean[0]), float(bounds[0][used].mean()), float(bounds[1][used].mean())
    low, high = logit_interval(mean, error, confidence=confidence)
    return float(mean[0]), float(low[0]), float(high[0])


def _group_numbers(names: Sequence[str] | Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.unique(np.asarray(names), return_inverse=True)[1]


def _sum_by_group(
    rows: Float[np.ndarray, "n c"], group: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "g c"]:
    ones, columns = np.ones(group.size), np.arange(group.size)
    shape = (int(group.max(initial=-1)) + 1, group.size)
    return np.asarray(csr_array((ones, (group, columns)), shape=shape) @ rows)


def _patients_with(
    is_so: Bool[np.ndarray, "n c"], group: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " c"]:
    """Patients with at least one such scan: scans of one patient are not independent evidence."""
    counted = np.count_nonzero(_sum_by_group(is_so.astype(float), group), axis=0)
    return np.asarray(counted, dtype=float)
