"""Repeat factors against App. B.2 of the LVIS paper, one scan at a time."""

import math

import numpy as np
import pytest

from ctfm.heads.sampling import (
    MAX_EPOCH_GROWTH,
    automatic_threshold,
    epoch_windows,
    repeat_effect,
    repeat_factors,
)

N, C = 211, 7


def labels(*, unknown: float = 0.1) -> np.ndarray:
    random = np.random.default_rng(4)
    y = (random.random((N, C)) < np.geomspace(0.01, 0.4, C)).astype(np.float32)
    y[random.random((N, C)) < unknown] = np.nan
    return y


def epoch_order(factors: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch with all scans in one window."""
    everything = [np.arange(len(factors))]
    ((window, order),) = epoch_windows(factors, windows=everything, seed=seed, epoch=epoch)
    assert window == 0
    return order


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


# 16 scans, f = 8/16, 4/16 and 1/16, worked out by hand: at t = 1/4 only the last finding is rarer
# than t, r(c) = √(16/4) = 2; at t = 1 they have r(c) = √2, 2 and 4.
FREQUENCIES = np.array([8, 4, 1])


def lvis_table() -> np.ndarray:
    y = np.zeros((16, 3), np.float32)
    y[0:8, 0] = 1
    y[6:10, 1] = 1
    y[15, 2] = 1
    return y


def test_reproduces_factors_worked_out_by_hand() -> None:
    assert (lvis_table().sum(0) == FREQUENCIES).all()
    quarter = [1.0] * 15 + [2.0]
    np.testing.assert_allclose(repeat_factors(lvis_table(), threshold=1 / 4), quarter)
    root = math.sqrt(2)
    whole = [root] * 6 + [2.0] * 4 + [1.0] * 5 + [4.0]
    np.testing.assert_allclose(repeat_factors(lvis_table(), threshold=1.0), whole)


def test_the_effect_of_repeats_worked_out_by_hand() -> None:
    effect = repeat_effect(lvis_table(), threshold=1 / 4)
    assert effect.growth == pytest.approx(17 / 16)
    assert effect.repeated == pytest.approx(1 / 16)
    assert effect.repeated_findings == 1
    np.testing.assert_allclose(effect.before, [8 / 16, 4 / 16, 1 / 16])
    np.testing.assert_allclose(effect.after, [8 / 17, 4 / 17, 2 / 17])


def test_the_effect_is_the_mean_over_epochs() -> None:
    y = labels()
    effect = repeat_effect(y, threshold=0.3)
    factors = repeat_factors(y, threshold=0.3)
    visited = np.concatenate([epoch_order(factors, seed=0, epoch=epoch) for epoch in range(400)])
    assert len(visited) / 400 / N == pytest.approx(effect.growth, abs=0.01)
    np.testing.assert_allclose(np.nanmean(y[visited], axis=0), effect.after, rtol=0.02)
    np.testing.assert_allclose(np.nanmean(y, axis=0), effect.before, rtol=1e-6)


def test_a_finding_without_labels_or_positives_has_no_effect() -> None:
    y = np.array([[np.nan, 0, 1], [np.nan, 0, 0]], np.float32)
    effect = repeat_effect(y, threshold=0.4)
    np.testing.assert_array_equal(effect.before, [np.nan, 0, 0.5])
    np.testing.assert_array_equal(effect.after, [np.nan, 0, 0.5])
    assert effect.repeated_findings == 0
    assert effect.repeated == 0


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


def thirds() -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(9).permutation(N), 3)


def test_one_window_is_the_order_of_an_epoch_that_it_has_always_been() -> None:
    factors = repeat_factors(labels(), threshold=0.3)
    random = np.random.default_rng([5, 2])
    visits = np.floor(factors) + (random.random(N) < factors - np.floor(factors))
    expected = random.permutation(np.repeat(np.arange(N), visits.astype(int)))
    np.testing.assert_array_equal(epoch_order(factors, seed=5, epoch=2), expected)


def test_an_epoch_goes_window_by_window_and_visits_no_scan_more_or_less_often() -> None:
    factors = repeat_factors(labels(), threshold=0.3)
    whole = np.bincount(epoch_order(factors, seed=5, epoch=2), minlength=N)
    numbers = []
    for number, order in epoch_windows(factors, windows=thirds(), seed=5, epoch=2):
        inside = np.zeros(N, bool)
        inside[thirds()[number]] = True
        assert inside[order].all()
        np.testing.assert_array_equal(np.bincount(order, minlength=N)[inside], whole[inside])
        assert (np.diff(order) < 0).any()
        numbers.append(number)
    assert sorted(numbers) == [0, 1, 2]


def test_windows_come_in_another_order_in_another_epoch() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        return [
            tuple(
                number
                for number, _ in epoch_windows(np.ones(N), windows=thirds(), seed=seed, epoch=epoch)
            )
            for epoch in range(20)
        ]

    assert orders(0) == orders(0)
    assert orders(0) != orders(1)
    assert len(set(orders(0))) == 6


@pytest.mark.parametrize("windows", [[[0, 1], [1, 2]], [[0], [2]], [[0, 1, 2, 3]]])
def test_windows_that_miss_or_repeat_a_scan_are_refused(windows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="each of 3 scans exactly once"):
        list(epoch_windows(np.ones(3), windows=[np.array(w) for w in windows], seed=0, epoch=0))
