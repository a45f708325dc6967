"""Stratified splits: shares of patients and of each finding, by patients, from the salt alone."""

from collections import Counter

import numpy as np

from ctfm.store.splits import SPLITS, split_patients
from ctfm.store.stratified import stratified_parts

SHARES = (0.6, 0.2, 0.2)
N, C = 150, 4


def cohort(seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Scans of about 100 patients; findings of 50%, 20%, 10% and 10 scans, some unknown."""
    random = np.random.default_rng(seed)
    patients = [f"p{random.integers(100):03d}" for _ in range(N)]
    y = (random.random((N, C)) < (0.5, 0.2, 0.1, 0.07)).astype(np.float32)
    y[random.random((N, C)) < 0.1] = np.nan
    return patients, y


def test_no_patient_is_torn_and_shares_are_kept() -> None:
    patients, y = cohort()
    parts = stratified_parts(patients, y, shares=SHARES, salt="ctfm")
    of = dict(zip(patients, parts.tolist(), strict=True))
    assert parts.tolist() == [of[one] for one in patients]
    counts = Counter(of.values())
    for part, share in enumerate(SHARES):
        assert abs(counts[part] - share * len(of)) <= 3


def test_each_finding_has_its_share_in_every_part_which_a_hash_does_not_give() -> None:
    patients, y = cohort()

    def worst(parts: np.ndarray) -> float:
        """Most positive patients that a part has too many or too few of a finding."""
        off = []
        for c in range(C):
            positive = {one for one, label in zip(patients, y[:, c], strict=True) if label == 1}
            of = dict(zip(patients, parts.tolist(), strict=True))
            counts = Counter(of[one] for one in positive)
            off += [abs(counts[k] - share * len(positive)) for k, share in enumerate(SHARES)]
        return max(off)

    drawn = split_patients(patients, salt="ctfm", fractions=SHARES)
    hashed = np.array([SPLITS.index(one) for one in drawn.tolist()])
    assert worst(stratified_parts(patients, y, shares=SHARES, salt="ctfm")) < 2 < worst(hashed)


def test_the_rarer_of_positives_and_negatives_is_shared_out() -> None:
    patients = [f"p{i}" for i in range(50)]
    y = np.ones((50, 1), np.float32)
    y[::5] = 0
    parts = stratified_parts(patients, y, shares=SHARES, salt="s")
    assert [(parts[::5] == k).sum() for k in range(3)] == [6, 2, 2]


def test_the_order_of_scans_and_findings_of_nobody_make_no_difference() -> None:
    patients, y = cohort()
    parts = stratified_parts(patients, y, shares=SHARES, salt="ctfm")
    order = np.random.default_rng(1).permutation(N)
    shuffled = stratified_parts([patients[i] for i in order], y[order], shares=SHARES, salt="ctfm")
    assert shuffled.tolist() == parts[order].tolist()


def test_another_salt_gives_another_split() -> None:
    patients, y = cohort()
    one, other = (stratified_parts(patients, y, shares=SHARES, salt=salt) for salt in "ab")
    assert (one != other).mean() > 0.2


def test_patients_of_whom_nothing_is_known_are_shared_out_too() -> None:
    patients = [f"p{i}" for i in range(10)]
    parts = stratified_parts(
        patients, np.full((10, 2), np.nan, np.float32), shares=SHARES, salt="s"
    )
    assert Counter(parts.tolist()) == {0: 6, 1: 2, 2: 2}


def test_follows_the_algorithm_of_the_paper_on_a_case_by_hand() -> None:
    """Two parts of half each. The rare label has two patients: one each. Then the other label."""
    y = np.array([[1, 1], [1, 1], [np.nan, 1], [np.nan, 1], [np.nan, np.nan]], np.float32)
    parts = stratified_parts([*"abcde"], y, shares=(0.5, 0.5), salt="s").tolist()
    assert sorted(parts[:2]) == [0, 1]
    assert sorted(parts[2:4]) == [0, 1]
