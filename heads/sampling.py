"""Repeat-factor sampling: labels, to the order in which an epoch visits the scans.

Scans with a rare finding are visited more often (Gupta et al. 2019, LVIS, App. B.2):

    f(c) = share of scans with finding c        r(c) = max(1, √(t / f(c)))
    r(scan) = max of r(c) over its findings, 1 without any

The fraction of r is rounded up or down at random, anew in each epoch, so the expected number of
visits is r itself. An unknown label (NaN) counts neither for f nor for r. Repeats also drag common
findings along that come with rare ones: prevalences rise, they do not become equal.

Axes: n scans of the training split, c findings.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

MAX_EPOCH_GROWTH = 1.4
"""An automatic threshold makes the expected epoch at most this many times the number of scans."""


def rarest_frequency(labels: Float[np.ndarray, "n c"]) -> Float64[np.ndarray, " n"]:
    """Frequency f of the rarest finding that each scan has; infinite for a scan without any.

    Args:
        labels: 1, 0 or NaN.
    """
    positive = labels == 1
    known = np.count_nonzero(~np.isnan(labels), axis=0)
    frequency = np.count_nonzero(positive, axis=0) / np.maximum(known, 1)
    rarest: Float64[np.ndarray, " n"] = np.where(positive, frequency, np.inf).min(
        axis=1, initial=np.inf
    )
    return rarest


def repeat_factors(
    labels: Float[np.ndarray, "n c"], *, threshold: float
) -> Float64[np.ndarray, " n"]:
    """Expected visits r of each scan in an epoch, at least 1.

    Args:
        labels: 1, 0 or NaN.
        threshold: t, the frequency below which a finding is repeated; 0 repeats none.
    """
    return _factors(rarest_frequency(labels), threshold)


def automatic_threshold(
    labels: Float[np.ndarray, "n c"], *, growth: float = MAX_EPOCH_GROWTH
) -> float:
    """The largest t in 0..1 whose expected epoch is at most `growth` times the number of scans.

    The mean of r grows with t without a jump, so bisection finds it, to within 1e-9.
    """
    rarest = rarest_frequency(labels)
    low, high = 0.0, 1.0
    if _factors(rarest, high).mean() <= growth:
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _factors(rarest, middle).mean() <= growth:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, kw_only=True)
class RepeatEffect:
    """What repeats do to an epoch, in expectation."""

    threshold: float

    growth: float
    """Visits of an epoch over the number of scans."""

    repeated: float
    """Share of the scans that are visited more than once."""

    before: Float64[np.ndarray, " c"]
    """Prevalence of each finding among the known labels."""

    after: Float64[np.ndarray, " c"]
    """The same among the visits."""


def repeat_effect(labels: Float[np.ndarray, "n c"], *, threshold: float) -> RepeatEffect:
    """The effect of a threshold on the labels of the training scans.

    Args:
        labels: 1, 0 or NaN.
        threshold: t, as for `repeat_factors`.
    """
    factors = repeat_factors(labels, threshold=threshold)
    positive, known = labels == 1, ~np.isnan(labels)
    return RepeatEffect(
        threshold=threshold,
        growth=float(factors.mean()),
        repeated=float((factors > 1).mean()),
        before=positive.sum(0) / np.maximum(known.sum(0), 1),
        after=(factors @ positive) / np.maximum(factors @ known, 1),
    )


def epoch_order(
    factors: Float64[np.ndarray, " n"], *, seed: int, epoch: int
) -> Int64[np.ndarray, " visits"]:
    """Indices of the scans in the order in which one epoch visits them, repeats included.

    It depends on (seed, epoch) alone, so an epoch can be repeated by itself.

    Args:
        factors: Expected visits of each scan.
        seed: Of the run; not negative.
        epoch: Number of the epoch; not negative.
    """
    random = np.random.default_rng([seed, epoch])
    whole = np.floor(factors)
    visits = (whole + (random.random(len(factors)) < factors - whole)).astype(np.int64)
    return random.permutation(np.repeat(np.arange(len(factors), dtype=np.int64), visits))


def _factors(rarest: Float64[np.ndarray, " n"], threshold: float) -> Float64[np.ndarray, " n"]:
    return np.maximum(1.0, np.sqrt(threshold / rarest))
