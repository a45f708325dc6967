"""Splits by patient: stable, in proportion, never torn."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctfm.store.errors import ConfigError
from ctfm.store.splits import (
    SPLITS,
    fold_patients,
    fold_split,
    split_named,
    split_patients,
)

IDS = [f"p{i:05d}" for i in range(20_000)]


def test_follows_the_hash_of_salt_and_id() -> None:
    for patient, split in zip(IDS[:50], split_patients(IDS), strict=False):
        content = hashlib.sha256(b"ctfm\x00" + patient.encode()).hexdigest()
        share = int(content[:16], 16) / 16**16
        expected = SPLITS[int(share >= 0.8) + int(share >= 0.9)]
        assert split == expected


def test_shares_are_those_asked_for() -> None:
    for fractions in [(0.8, 0.1, 0.1), (0.5, 0.2, 0.3)]:
        splits = split_patients(IDS, fractions=fractions)
        shares = [np.mean(splits == name) for name in SPLITS]
        np.testing.assert_allclose(shares, fractions, atol=0.012)


@given(st.lists(st.text(), max_size=20), st.lists(st.text(), max_size=20))
def test_a_patient_keeps_the_split_when_the_cohort_grows(old: list[str], new: list[str]) -> None:
    assert split_patients(old + new)[: len(old)].tolist() == split_patients(old).tolist()
    assert split_patients(old).tolist() == [split_patients([patient]).item() for patient in old]


def test_another_salt_is_an_independent_split() -> None:
    one, other = split_patients(IDS), split_patients(IDS, salt="again")
    tests_of_both = np.mean((one == "test") & (other == "test"))
    assert tests_of_both == pytest.approx(0.01, abs=0.003)


def test_salt_and_id_are_kept_apart() -> None:
    shares, ids = (0.5, 0.25, 0.25), [f"c{i}" for i in range(64)]
    one = split_patients([f"b{end}" for end in ids], salt="a", fractions=shares)
    other = split_patients(ids, salt="ab", fractions=shares)
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize("fractions", [(0.8, 0.2, 0.0), (0.8, 0.0, 0.2), (1.0, 0.0, 0.0)])
def test_a_share_of_zero_gets_nobody(fractions: tuple[float, float, float]) -> None:
    found = set(split_patients(IDS, fractions=fractions).tolist())
    assert found == {name for name, share in zip(SPLITS, fractions, strict=True) if share}


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.0, 0.5, 0.5), (float("nan"), 0.5, 0.5)]
)
def test_refuses_shares_that_cannot_be(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match=r"shares of train, validation and test"):
        split_patients(["p"], fractions=fractions)


@pytest.mark.parametrize(
    ("word", "split"),
    [("train", "train"), (" Val ", "validation"), ("dev", "validation"), ("TEST", "test")],
)
def test_knows_the_usual_words(word: str, split: str) -> None:
    assert split_named(word) == split


def test_does_not_guess_other_words() -> None:
    assert split_named("hold-out") is None


@pytest.mark.parametrize("folds", [3, 5, 10])
def test_a_fold_is_an_equal_share_of_the_hash_of_salt_and_id(folds: int) -> None:
    found = fold_patients(IDS[:200], folds=folds)
    for patient, fold in zip(IDS, found, strict=False):
        content = hashlib.sha256(b"ctfm\x00" + patient.encode()).hexdigest()
        share = int(content[:16], 16) / 16**16
        assert fold / folds <= share < (fold + 1) / folds


def test_folds_are_about_equal() -> None:
    sizes = np.bincount(fold_patients(IDS[:10_000], folds=5))
    assert len(sizes) == 5
    np.testing.assert_allclose(sizes, 2000, atol=4 * 40)


@given(st.lists(st.text(), max_size=20), st.lists(st.text(), max_size=20))
def test_a_patient_keeps_the_fold_when_the_cohort_grows(old: list[str], new: list[str]) -> None:
    grown = fold_patients(old + new, folds=5)
    assert grown[: len(old)].tolist() == fold_patients(old, folds=5).tolist()
    by_patient: dict[str, set[int]] = {}
    for patient, fold in zip(old + new, grown.tolist(), strict=True):
        by_patient.setdefault(patient, set()).add(fold)
    assert all(len(of_one) == 1 for of_one in by_patient.values())


def test_another_salt_gives_independent_folds() -> None:
    one, other = fold_patients(IDS, folds=5), fold_patients(IDS, folds=5, salt="again")
    assert np.mean(one == other) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("folds", [3, 5])
def test_every_patient_is_tested_once_and_validates_once(folds: int) -> None:
    fold_of = fold_patients(IDS[:500], folds=folds)
    splits = np.array([fold_split(fold_of, fold=fold, folds=folds) for fold in range(folds)])
    for name, times in (("test", 1), ("validation", 1), ("train", folds - 2)):
        assert ((splits == name).sum(axis=0) == times).all()


def test_the_fold_after_the_test_validates() -> None:
    fold_of = np.array([0, 1, 2, 3, 1])
    names = ["train", "test", "validation", "train", "test"]
    assert fold_split(fold_of, fold=1, folds=4).tolist() == names
    assert fold_split(fold_of, fold=3, folds=4).tolist() == [
        "validation",
        "train",
        "train",
        "test",
        "train",
    ]


@pytest.mark.parametrize(("fold", "folds"), [(0, 2), (5, 5), (-1, 5)])
def test_refuses_folds_that_cannot_be(fold: int, folds: int) -> None:
    with pytest.raises(ConfigError, match="fold"):
        fold_split(np.array([0, 1]), fold=fold, folds=folds)
    if folds < 3:
        with pytest.raises(ConfigError, match="at least 3"):
            fold_patients(["p"], folds=folds)
