"""Ranking metrics: labels and scores of many findings, to one number a finding.

The area under the ROC curve is the share of (positive, negative) pairs that the score puts in
the right order, ties counting half (Mann and Whitney); here it is counted exactly by searching the
positives among the sorted negatives. The choice of operating points is `youden_threshold`;
intervals are in `heads/intervals.py`.

Axes: v variants (heads that answer for the same scans), n scans, c findings. A label is 1, 0 or
NaN for unknown; an unknown one counts nowhere.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Shaped

Labels = Float[np.ndarray, "n c"]
Scores = Float[np.ndarray, "n c"]


def auc_per_finding(
    labels: Labels, scores: Float[np.ndarray, "*v n c"], *, min_positives: int = 1
) -> Float[np.ndarray, "*v c"]:
    """Area under the ROC curve of each finding, exact with ties.

    Args:
        labels: 1, 0 or NaN for unknown.
        scores: Logits or probabilities, higher for more likely. Infinite ones are fine.
        min_positives: Fewest positives, and fewest negatives, that make a finding estimable.

    Returns:
        In 0..1; NaN where the finding is not estimable, or a score of a known label is NaN.
    """

    def auc(positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " q"]) -> float:
        wins = pairs_won(positive, negative)
        return float(wins.sum() / (2 * positive.size * negative.size))

    return _per_finding(auc, labels, scores, min_positives=min_positives)


def average_precision_per_finding(
    labels: Labels, scores: Float[np.ndarray, "*v n c"], *, min_positives: int = 1
) -> Float[np.ndarray, "*v c"]:
    """Average precision of each finding: the mean over positives of the precision at their score.

    It is the step-wise sum Σ (Rₖ − Rₖ₋₁) Pₖ over distinct scores, without interpolation. A score
    that knows nothing reaches the prevalence.

    Args:
        labels: 1, 0 or NaN for unknown.
        scores: Logits or probabilities, higher for more likely.
        min_positives: Fewest positives, and fewest negatives, that make a finding estimable.

    Returns:
        In 0..1; NaN where `auc_per_finding` gives NaN.
    """

    def precision(positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " q"]) -> float:
        true = positive.size - np.searchsorted(positive, positive)
        false = negative.size - np.searchsorted(negative, positive)
        return float((true / (true + false)).mean())

    return _per_finding(precision, labels, scores, min_positives=min_positives)


def _per_finding(
    measure: Callable[[Float[np.ndarray, " p"], Float[np.ndarray, " q"]], float],
    labels: Labels,
    scores: Float[np.ndarray, "*v n c"],
    *,
    min_positives: int,
) -> Float[np.ndarray, "*v c"]:
    variants = scores.reshape(math.prod(scores.shape[:-2]), *labels.shape)
    found = np.full((len(variants), labels.shape[1]), np.nan)
    for v, of_one in enumerate(variants):
        for c, positive, negative in estimable(labels, of_one, min_positives=min_positives):
            found[v, c] = measure(positive, negative)
    return found.reshape(*scores.shape[:-2], labels.shape[1])


def estimable(
    labels: Labels, scores: Scores, *, min_positives: int
) -> Iterator[tuple[int, Float[np.ndarray, " p"], Float[np.ndarray, " q"]]]:
    """Go through the findings with enough positives and negatives.

    Yields:
        The column, the sorted scores of its positives and the sorted scores of its negatives.
    """
    least = max(min_positives, 1)
    # One copy that makes every finding contiguous: sorting a strided column is slower.
    by_finding = np.ascontiguousarray(scores.T)
    is_positive = np.ascontiguousarray((labels == 1).T)
    is_negative = np.ascontiguousarray((labels == 0).T)
    for c, row in enumerate(by_finding):
        positive, negative = row[is_positive[c]], row[is_negative[c]]
        if min(positive.size, negative.size) < least:
            continue
        positive.sort()
        negative.sort()
        # NaN sorts last.
        if not (np.isnan(positive[-1]) or np.isnan(negative[-1])):
            yield c, positive, negative


def pairs_won(
    scores: Float[np.ndarray, " p"], rivals: Float[np.ndarray, " q"]
) -> Shaped[np.ndarray, " p"]:
    """For each score, twice the number of sorted rivals below it, ties counting half."""
    return np.searchsorted(rivals, scores) + np.searchsorted(rivals, scores, side="right")


def roc_curve(
    labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"], *, max_points: int = 200
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The ROC curve of one finding, thinned for drawing.

    Args:
        labels: 1, 0 or NaN for unknown.
        scores: Higher for more likely.
        max_points: Most points returned; the first, (0, 0), and the last, (1, 1), stay.

    Returns:
        False and true positive rates, both rising; empty where a class has no scan.
    """
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not (positive.size and negative.size):
        return np.empty(0), np.empty(0)
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    true = 1 - np.searchsorted(positive, thresholds) / positive.size
    false = 1 - np.searchsorted(negative, thresholds) / negative.size
    false, true = np.concatenate([[0.0], false]), np.concatenate([[0.0], true])
    corner = _corners(false, true)
    false, true = false[corner], true[corner]
    last = false.size - 1
    kept = np.unique(np.linspace(0, last, min(max_points, last + 1)).round().astype(int))
    return false[kept], true[kept]


def _corners(x: Float[np.ndarray, " k"], y: Float[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
    """False at points inside a straight run, which a drawing does not need."""
    dx, dy = np.diff(x), np.diff(y)
    turns = ~np.isclose(dx[1:] * dy[:-1], dx[:-1] * dy[1:], rtol=1e-9, atol=0)
    return np.concatenate([[True], turns, [True]])


def youden_threshold(labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """The score with the largest sensitivity + specificity − 1; positive means ≥ threshold.

    It is halfway between two neighbouring scores, so that it does not sit on a scan; it is the
    higher of the two where no number lies between them, or where one is infinite. Among equally
    good ones the highest is taken.

    Returns:
        NaN where a class has no scan: there is nothing to choose by.
    """
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not (positive.size and negative.size):
        return float("nan")
    thresholds = np.unique(np.concatenate([positive, negative]))
    sensitivity = 1 - np.searchsorted(positive, thresholds) / positive.size
    specificity = np.searchsorted(negative, thresholds) / negative.size
    index = thresholds.size - 1 - int(np.argmax((sensitivity + specificity)[::-1]))
    at = float(thresholds[index])
    below = float(thresholds[index - 1]) if index else at
    between = below / 2 + at / 2  # their sum may overflow
    return between if below < between < at and math.isfinite(between) else at
