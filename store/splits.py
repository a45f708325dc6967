"""Splits: from a patient to train, validation or test, by a salted hash.

The split of a patient depends on the salt and the id alone, so it stays when the cohort grows or
shrinks, and the same patient never lies in two. 80/10/10 as in the paper.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Int64, Shaped

from ctfm.store.errors import ConfigError

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

FRACTIONS = (0.8, 0.1, 0.1)
"""Shares of train, validation and test."""

SALT = "ctfm"
"""Another salt gives another, independent split."""

_ALIASES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def split_of(
    patient_id: str,
    *,
    salt: str = SALT,
    fractions: tuple[float, float, float] = FRACTIONS,
) -> Split:
    """The split of one patient.

    Args:
        patient_id: As the catalogue has it.
        salt: Any text.
        fractions: Shares of train, validation and test; they add up to 1.

    Raises:
        ConfigError: If the fractions are negative, do not add up to 1, or leave nothing to train.
    """
    check_fractions(fractions)
    return _split(patient_id, salt=salt, fractions=fractions)


def split_patients(
    patient_ids: Iterable[str],
    *,
    salt: str = SALT,
    fractions: tuple[float, float, float] = FRACTIONS,
) -> Shaped[np.ndarray, " n"]:
    """The split of each patient, as text; a patient may occur more than once.

    Raises:
        ConfigError: As `split_of`.
    """
    check_fractions(fractions)
    ids = list(patient_ids)
    known = {one: _split(one, salt=salt, fractions=fractions) for one in set(ids)}
    return np.array([known[one] for one in ids], dtype="<U10")


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Refuse shares that cannot be.

    Raises:
        ConfigError: If they are negative, do not add up to 1, or leave nothing to train.
    """
    numbers = all(isinstance(share, float | int) for share in fractions)
    usable = numbers and len(fractions) == 3 and all(0 <= share <= 1 for share in fractions)
    if not usable or fractions[0] == 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ConfigError(
            "fractions are the shares of train, validation and test, such as 0.8, 0.1, 0.1: from "
            f"0 to 1, adding up to 1, some for train; got {', '.join(map(str, fractions))}"
        )


def split_named(name: str) -> Split | None:
    """The split that a word in a table means (`val`, `dev`, `Training` …), None if none."""
    return _ALIASES.get(name.strip().lower())


def fold_patients(
    patient_ids: Iterable[str], *, salt: str = SALT, folds: int
) -> Int64[np.ndarray, " n"]:
    """The fold of each patient, from 0; a patient may occur more than once.

    Like a split it depends on the salt and the id alone, so it stays when the cohort grows.

    Args:
        patient_ids: As the catalogue has them.
        salt: Any text.
        folds: How many there are, at least 3: one tests, one validates, the others train.

    Raises:
        ConfigError: If there are fewer.
    """
    if folds < 3:
        raise ConfigError(f"a cross-validation needs at least 3 folds, got {folds}")
    ids = list(patient_ids)
    known = {one: int(_uniform(one, salt=f"{salt} folds") * folds) for one in set(ids)}
    return np.array([known[one] for one in ids], dtype=np.int64)


def fold_split(
    fold_of: Int64[np.ndarray, " n"], *, fold: int, folds: int
) -> Shaped[np.ndarray, " n"]:
    """The split of each patient, as text, when one fold is tested and the next one validates.

    Args:
        fold_of: As `fold_patients` gives it.
        fold: Which one is tested.
        folds: How many there are.
    """
    split = np.full(len(fold_of), "train", dtype="<U10")
    split[fold_of == (fold + 1) % folds] = "validation"
    split[fold_of == fold] = "test"
    return split


def _split(patient_id: str, *, salt: str, fractions: tuple[float, float, float]) -> Split:
    uniform = _uniform(patient_id, salt=salt)
    if uniform < fractions[0]:
        return "train"
    return "validation" if uniform < 1 - fractions[2] else "test"


def _uniform(patient_id: str, *, salt: str) -> float:
    """A number in [0, 1) that is the patient's own."""
    # NUL keeps salt and id apart: ("a", "bc") is not ("ab", "c").
    content = hashlib.sha256(f"{salt}\0{patient_id}".encode()).digest()
    return (int.from_bytes(content[:8], "big") >> 11) / 2**53  # 53 bits are exact
