"""Patients: from what a catalogue and a label table say, to groups that no split may tear.

A catalogue knows the patient of a NIfTI file only from its name, and of a DICOM series whose
PatientID was removed not at all: then each file or study counts as a patient. A label table that
names patients knows better. Scans that either of the two gives to one patient are one patient's.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def patient_groups(own: Sequence[str], said: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """Number the patients of scans.

    Args:
        own: Of each scan, as the catalogue has it.
        said: Of each scan, as the labels have it, under the same key; "" where they say nothing.

    Returns:
        The same number for two scans exactly when they are linked by equal patients, each of
        either side, directly or through others.
    """
    place = {one: i for i, one in enumerate(dict.fromkeys([*own, *said]))}
    first = [place[one] for one in own]
    second = [place[one] if one else at for one, at in zip(said, first, strict=True)]
    links = coo_array((np.ones(len(first)), (first, second)), shape=(len(place), len(place)))
    _, groups = connected_components(links, directed=False)
    numbered: Int64[np.ndarray, " n"] = groups[first].astype(np.int64)
    return numbered
