"""Repeat-factor sampling: labels, to the order in which an epoch visits the scans.

Scans with a rare finding are visited more often (Gupta et al. 2019, LVIS, App. B.2):

    f(c) = share of scans with finding c        r(c) = max(1, √(t / f(c)))
    r(scan) = max of r(c) over its findings, 1 without any

The fraction of r is rounded up or down at random, anew in each epoch, so the expected number of
visits is r itself. An unknown label (NaN) counts neither for f nor for r. Repeats also drag common
findings along that come with rare ones: prevalences rise, they do not become equal.

Axes: n scans of the training split, c findings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

MAX_EPOCH_GROWTH = 1.4
"""An automatic threshold makes the expected epoch at most this many times the number of scans."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RepeatEffect:
    """What repeats at a threshold do to an epoch, on average over epochs."""

    threshold: float
    """t."""

    growth: float
    """Visits of an epoch by scans."""

    repeated: float
    """Share of the scans that are visited more than once on average."""

    repeated_findings: int
    """Number of findings that are rarer than t, without those that no scan has."""

    before: Float64[np.ndarray, " c"]
    """Share of positives among the labels of each finding; NaN without labels."""

    after: Float64[np.ndarray, " c"]
    """The same among the visits."""


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


def repeat_effect(labels: Float[np.ndarray, "n c"], *, threshold: float) -> RepeatEffect:
    """What repeats at a threshold do to an epoch.

    Args:
        labels: 1, 0 or NaN; of one scan at least.
        threshold: t.
    """
    factors = repeat_factors(labels, threshold=threshold)
    positive = (labels == 1).astype(np.float64)
    known = (~np.isnan(labels)).astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a finding without labels
        before = positive.sum(0) / known.sum(0)
        after = (factors @ positive) / (factors @ known)
    return RepeatEffect(
        threshold=threshold,
        growth=float(factors.mean()),
        repeated=float((factors > 1).mean()),
        repeated_findings=int(np.count_nonzero((before > 0) & (before < threshold))),
        before=before,
        after=after,
    )


def epoch_windows(
    factors: Float64[np.ndarray, " n"],
    *,
    windows: Sequence[Int64[np.ndarray, " _"]],
    seed: int,
    epoch: int,
) -> Iterator[tuple[int, Int64[np.ndarray, " visits"]]]:
    """The order in which one epoch visits the scans, repeats included, one window after another.

    Windows come in an order of their own in each epoch, with the scans shuffled inside each.
    It depends on (seed, epoch) alone, so an epoch can be repeated by itself. How often a scan is
    visited does not depend on the windows. Scans of two windows never meet in a batch, so a window
    should hold scans from all over the split.

    Args:
        factors: Expected visits of each scan.
        windows: Indices of the scans of each window; every scan is in exactly one.
        seed: Of the run; not negative.
        epoch: Number of the epoch; not negative.

    Yields:
        The number of a window, and the indices of its scans as they are visited.

    Raises:
        ValueError: If a scan is in no window or in several.
    """
    if not np.array_equal(np.sort(np.concatenate(windows)), np.arange(len(factors))):
        raise ValueError(f"the windows must hold each of {len(factors)} scans exactly once")
    random = np.random.default_rng([seed, epoch])
    whole = np.floor(factors)
    visits = (whole + (random.random(len(factors)) < factors - whole)).astype(np.int64)
    for window in random.permutation(len(windows)):
        scans = windows[window]
        yield int(window), random.permutation(np.repeat(scans, visits[scans]))


def _factors(rarest: Float64[np.ndarray, " n"], threshold: float) -> Float64[np.ndarray, " n"]:
    return np.maximum(1.0, np.sqrt(threshold / rarest))
