"""Splits: from a patient to train, validation or test, or to a fold, by a salted hash.

The split of a patient depends on the salt and the id alone, so it stays when the cohort grows or
shrinks, and the same patient never lies in two. 80/10/10 as in the paper. So does the fold, which
is why folds are equal in size only about: 10,000 patients in five give 2,000 ± 40 each.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Int64, Shaped

from ctfm.store.errors import ConfigError
from ctfm.store.shares import FRACTIONS, check_fractions

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SALT = "ctfm"
"""Another salt gives another, independent split."""

_ALIASES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "tune": "validation",
    "tuning": "validation",
    "validierung": "validation",
    "test": "test",
    "testing": "test",
}


def split_patients(
    patient_ids: Iterable[str],
    *,
    salt: str = SALT,
    fractions: tuple[float, float, float] = FRACTIONS,
) -> Shaped[np.ndarray, " n"]:
    """The split of each patient, as text; a patient may occur more than once.

    Args:
        patient_ids: As the catalogue has them.
        salt: Any text.
        fractions: Shares of train, validation and test; they add up to 1.

    Raises:
        ConfigError: If the fractions are negative, do not add up to 1, or leave nothing to train.
    """
    check_fractions(fractions)
    ids = list(patient_ids)
    known = {one: _split(one, salt=salt, fractions=fractions) for one in set(ids)}
    return np.array([known[one] for one in ids], dtype="<U10")


def fold_patients(
    patient_ids: Iterable[str], *, folds: int, salt: str = SALT
) -> Int64[np.ndarray, " n"]:
    """The fold of each patient, from 0; a patient may occur more than once.

    Args:
        patient_ids: As the catalogue has them.
        folds: Number of folds, at least 3: one to test, one to validate, the rest to train.
        salt: Any text.

    Raises:
        ConfigError: If there are fewer than 3 folds.
    """
    _check_folds(folds)
    return np.array([(_bits(one, salt=salt) * folds) >> 53 for one in patient_ids], dtype=np.int64)


def fold_split(
    fold_of: Int64[np.ndarray, " n"], *, fold: int, folds: int
) -> Shaped[np.ndarray, " n"]:
    """The split of each patient where one fold is the test: the next validates, the rest train.

    Over all folds every patient is tested once and validates once.

    Args:
        fold_of: As `fold_patients` gives it for the same number of folds.
        fold: Of the test, from 0.
        folds: Number of folds.

    Raises:
        ConfigError: If there is no such fold, or there are fewer than 3.
    """
    _check_folds(folds)
    if not 0 <= fold < folds:
        raise ConfigError(f"fold must be from 0 to {folds - 1}, got {fold}")
    splits = np.full(len(fold_of), "train", dtype="<U10")
    splits[fold_of == fold] = "test"
    splits[fold_of == (fold + 1) % folds] = "validation"
    return splits


def split_named(name: str) -> Split | None:
    """The split that a word in a table means (`val`, `dev`, `Training set` …), None if none."""
    letters = re.sub(r"[\s_-]+", "", name.lower())
    return _ALIASES.get(letters.removesuffix("set"))


def _check_folds(folds: int) -> None:
    if folds < 3:
        raise ConfigError(f"folds must be at least 3 (test, validation and train), got {folds}")


def _split(patient_id: str, *, salt: str, fractions: tuple[float, float, float]) -> Split:
    uniform = _bits(patient_id, salt=salt) / 2**53  # [0, 1): 53 bits are exact
    if uniform < fractions[0]:
        return "train"
    return "validation" if uniform < 1 - fractions[2] else "test"


def _bits(patient_id: str, *, salt: str) -> int:
    """53 bits of the hash."""
    # NUL keeps salt and id apart: ("a", "bc") is not ("ab", "c").
    content = hashlib.sha256(f"{salt}\0{patient_id}".encode()).digest()
    return int.from_bytes(content[:8], "big") >> 11
