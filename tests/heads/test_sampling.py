"""Repeat factors against App. B.2 of the LVIS paper, one scan at a time."""

import math

import numpy as np
import pytest

from ctfm.heads.sampling import (
    MAX_EPOCH_GROWTH,
    automatic_threshold,
    epoch_order,
    repeat_effect,
    repeat_factors,
)

N, C = 211, 7


def labels(*, unknown: float = 0.1) -> np.ndarray:
    random = np.random.default_rng(4)
    y = (random.random((N, C)) < np.geomspace(0.01, 0.4, C)).astype(np.float32)
    y[random.random((N, C)) < unknown] = np.nan
    return y


def literal(y: np.ndarray, threshold: float) -> list[float]:
    frequency = []
    for c in range(C):
        known = [v for v in y[:, c] if not math.isnan(v)]
        frequency.append(sum(map(float, known)) / len(known))
    return [
        max([1.0] + [math.sqrt(threshold / frequency[c]) for c in range(C) if row[c] == 1])
        for row in y
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.05, 0.3, 1.0])
def test_matches_the_definition(threshold: float) -> None:
    expected = literal(labels(), threshold)
    np.testing.assert_allclose(repeat_factors(labels(), threshold=threshold), expected)


def test_scans_without_a_known_finding_are_not_repeated() -> None:
    y = np.array([[np.nan, 0], [1, np.nan], [0, 0]], np.float32)
    np.testing.assert_allclose(repeat_factors(y, threshold=1.0), [1, math.sqrt(2), 1])


def test_an_unknown_label_counts_neither_as_present_nor_as_absent() -> None:
    y = np.array([[1], [0], [np.nan], [np.nan]], np.float32)
    np.testing.assert_allclose(repeat_factors(y, threshold=1.0)[0], math.sqrt(2))


def test_the_automatic_threshold_is_the_largest_within_the_growth() -> None:
    y = labels()
    threshold = automatic_threshold(y)
    assert 0 < threshold < 1
    assert np.mean(literal(y, threshold)) <= MAX_EPOCH_GROWTH
    assert np.mean(literal(y, threshold + 1e-4)) > MAX_EPOCH_GROWTH


def test_the_automatic_threshold_of_common_or_no_findings_is_one() -> None:
    assert automatic_threshold(np.ones((5, 2), np.float32)) == 1.0
    assert automatic_threshold(np.zeros((5, 2), np.float32)) == 1.0
    assert automatic_threshold(np.full((5, 2), np.nan, np.float32)) == 1.0


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    factors = repeat_factors(labels(), threshold=0.3)
    first = epoch_order(factors, seed=1, epoch=2)
    np.testing.assert_array_equal(first, epoch_order(factors, seed=1, epoch=2))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        other = epoch_order(factors, seed=seed, epoch=epoch)
        assert len(first) != len(other) or (first != other).any()


def test_visits_are_the_factor_rounded_down_or_up_and_right_on_average() -> None:
    factors = repeat_factors(labels(), threshold=0.3)
    epochs = [
        np.bincount(epoch_order(factors, seed=0, epoch=epoch), minlength=N) for epoch in range(400)
    ]
    assert (np.min(epochs, axis=0) >= np.floor(factors)).all()
    assert (np.max(epochs, axis=0) <= np.ceil(factors)).all()
    np.testing.assert_allclose(np.mean(epochs, axis=0), factors, atol=0.13)


def test_without_repeats_an_epoch_is_a_permutation() -> None:
    order = epoch_order(np.ones(N), seed=0, epoch=1)
    assert (order != np.arange(N)).any()
    np.testing.assert_array_equal(np.sort(order), np.arange(N))


def test_reproduces_the_repeat_factors_of_lvis_on_a_fixed_table() -> None:
    # 10,000 images, t = 0.001; f(c) = 0.0001, 0.0005, 0.001, 0.1 by hand from App. B.2:
    # r(c) = √(t / f) = 3.1623, 1.4142, 1, and 1 for what is frequent.
    n = 10_000
    y = np.zeros((n, 4), np.float32)
    for c, count in enumerate((1, 5, 10, 1000)):
        y[np.arange(count) * (c + 1), c] = 1
    found = repeat_factors(y, threshold=0.001)
    assert found[0] == pytest.approx(10**0.5)  # the image with all four takes the rarest
    assert found[2] == pytest.approx(2**0.5)
    assert found[3] == 1
    assert found[9_999] == 1


def test_the_effect_of_repeats_is_what_an_epoch_shows() -> None:
    y = labels()
    effect = repeat_effect(y, threshold=0.1)
    factors = repeat_factors(y, threshold=0.1)
    orders = [epoch_order(factors, seed=0, epoch=epoch) for epoch in range(200)]
    visits = np.concatenate(orders)
    assert effect.growth == pytest.approx(len(visits) / 200 / N, rel=0.02)
    assert effect.repeated == np.mean(factors > 1)
    np.testing.assert_allclose(effect.after, np.nanmean(y[visits], axis=0), rtol=0.05)
    np.testing.assert_allclose(effect.before, np.nanmean(y, axis=0), rtol=1e-6)
