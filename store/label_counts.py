"""Label counts: from labels and a split, to what each finding has in each part.

Axes: n scans, c findings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Shaped

FEW_TEST_PATIENTS = 20
"""Fewer patients than that in test make intervals so wide that hardly any result stands out."""


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """One part of a split."""

    name: str
    patients: int
    scans: int
    positives: tuple[int, ...]
    """Scans with each finding."""
    known: tuple[int, ...]
    """Scans of which each finding is known."""

    def estimable(self, *, min_positives: int) -> Bool[np.ndarray, " c"]:
        """Findings with so many scans with, and so many without, that they have an AUC."""
        positives, known = np.array(self.positives), np.array(self.known)
        fewest = np.minimum(positives, known - positives)
        enough: Bool[np.ndarray, " c"] = fewest >= min_positives
        return enough


def count_parts(
    y: Float32[np.ndarray, "n c"],
    *,
    patient_ids: Sequence[str],
    split: Shaped[np.ndarray, " n"],
    names: Sequence[str],
) -> list[PartCounts]:
    """Count each part.

    Args:
        y: 1, 0, or NaN where unknown.
        patient_ids: Of each scan.
        split: Of each scan.
        names: Of the parts.
    """
    patients = np.array(patient_ids, dtype=object)
    counted = []
    for name in names:
        inside = np.asarray(split == name)
        counted.append(
            PartCounts(
                name=name,
                patients=len(set(patients[inside])),
                scans=int(inside.sum()),
                positives=tuple((y[inside] == 1).sum(axis=0).tolist()),
                known=tuple((~np.isnan(y[inside])).sum(axis=0).tolist()),
            )
        )
    return counted
