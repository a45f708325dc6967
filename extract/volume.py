"""A CT volume in Hounsfield units with the true place of every slice.

Axes: z slices, y rows, x columns. World coordinates are RAS millimetres: x grows to the patient's
right, y to the front, z to the top of the head, as in NIfTI. DICOM's LPS is converted where a file
is read, nowhere else.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int16


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """Voxels in HU, and where each slice lies; a sheared (tilted) or uneven stack is normal.

    The centre of voxel (z, y, x) is `slice_origin_mm[z] + y * row_step_mm + x * column_step_mm`.
    Slices are sorted by their position along the normal of the image plane, feet to head.
    """

    hu: Int16[np.ndarray, "z y x"]
    """Hounsfield units; what lies outside the scanner's field of view is at most -1000."""

    slice_origin_mm: Float[np.ndarray, "z 3"]
    """RAS position of the centre of the first voxel of each slice."""

    row_step_mm: Float[np.ndarray, "3"]
    """RAS vector from one row to the next (y + 1)."""

    column_step_mm: Float[np.ndarray, "3"]
    """RAS vector from one column to the next (x + 1)."""
