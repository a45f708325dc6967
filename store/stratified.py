"""Stratified splits: from the labels of patients, to parts in which each finding has its share.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, ECML PKDD, Algorithm 1): the rarest
label first, each of its patients goes to the part that lacks most of that label. Labels are "has a
positive scan" and "has a negative scan" of every finding, so the rarer of the two is what counts.
Where the algorithm draws at random, this one follows a salted hash of the patient's id: the parts
depend on salt, patients and labels alone. They do depend on all of these: with another patient or
label any other patient may move, which a split by `ctfm.store.splits` does not do.

Axes: n scans, p patients, l labels, k parts.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64


def stratified_parts(
    patient_ids: Sequence[str],
    y: Float32[np.ndarray, "n c"],
    *,
    shares: Sequence[float],
    salt: str,
) -> Int64[np.ndarray, " n"]:
    """The part of each scan, from 0; all scans of a patient are in one.

    Args:
        patient_ids: Of each scan.
        y: 1, 0, or NaN where unknown.
        shares: Of the patients, one a part; they add up to 1.
        salt: Any text.
    """
    hashes = {one: _hash(one, salt=salt) for one in patient_ids}
    order = sorted(hashes, key=lambda one: (hashes[one], one))
    place = {one: i for i, one in enumerate(order)}
    patient = np.array([place[one] for one in patient_ids], dtype=np.int64)
    has = np.zeros((len(order), 2 * y.shape[1]), dtype=bool)
    np.logical_or.at(has, patient, np.concatenate([y == 1, y == 0], axis=1))
    parts: Int64[np.ndarray, " n"] = _distributed(has, np.asarray(shares))[patient]
    return parts


def _distributed(
    has: Bool[np.ndarray, "p l"], shares: Float64[np.ndarray, " k"]
) -> Int64[np.ndarray, " p"]:
    """The part of each patient."""
    size = len(has) * shares
    wanted = np.outer(shares, has.sum(axis=0))
    left = has.sum(axis=0)
    parts = np.full(len(has), -1, dtype=np.int64)
    while (left > 0).any():
        label = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
        for one in np.flatnonzero(has[:, label] & (parts < 0)):
            part = _neediest(wanted[:, label], size)
            parts[one] = part
            wanted[part, has[one]] -= 1
            size[part] -= 1
            left[has[one]] -= 1
    for one in np.flatnonzero(parts < 0):  # no label is known of them
        parts[one] = int(np.argmax(size))
        size[parts[one]] -= 1
    return parts


def _neediest(wanted: Float64[np.ndarray, " k"], size: Float64[np.ndarray, " k"]) -> int:
    """The part that lacks most of a label; of several the one that lacks most patients."""
    # Shares are decimal fractions: sums that should be equal differ in their last bits.
    rounded = np.round(wanted, 9)
    return int(np.argmax(np.where(rounded == rounded.max(), size, -np.inf)))


def _hash(patient_id: str, *, salt: str) -> bytes:
    # Not the draw of `ctfm.store.splits`, on whose order the parts must not depend.
    return hashlib.sha256(f"stratified\0{salt}\0{patient_id}".encode()).digest()
