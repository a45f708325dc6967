"""Pixel signs: from stored values that a header calls unsigned, to those of them that are negative.

A part of RSNA 2019 is so. The rule is that of all formats: `voxels.negative_values`.

Axes: z slices, y rows, x columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from ctfm.extract.dicom import Plane
from ctfm.extract.voxels import NO_AIR_HU, negative_values


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredImage:
    """One plane as it was stored."""

    plane: Plane
    stored: Shaped[np.ndarray, "y x"]
    padding: tuple[int, int] | None
    """First and last value."""

    def hu_of(self, stored: Integer[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The HU of stored values."""
        return stored * np.float64(self.plane.slope) + self.plane.intercept


def lost_signs(images: Sequence[StoredImage]) -> Bool[np.ndarray, " values"] | None:
    """Which stored values are negative though the header calls all unsigned, as in RSNA 2019.

    Returns:
        True at the negative ones of all values that the bits can hold; None if none is.
    """
    said = {(one.plane.facts.bits_stored, one.plane.slope, one.plane.intercept) for one in images}
    for image in images:
        unsigned = image.stored.dtype.kind == "u" and image.stored.dtype.itemsize <= 2
        lowest = image.stored.min(keepdims=True)[0]
        if not unsigned or len(said) > 1 or image.hu_of(lowest)[0] < NO_AIR_HU:
            return None
    bits = images[0].plane.facts.bits_stored
    counts = np.zeros(1 << bits, np.int64)
    for image in images:
        counts += np.bincount(image.stored.ravel(), minlength=1 << bits)
    return negative_values(counts, images[0].hu_of(np.arange(1 << bits) - (1 << bits)))


def with_signs(image: StoredImage, negative: Bool[np.ndarray, " values"]) -> StoredImage:
    wrapped = np.where(negative[image.stored], len(negative), 0)
    return replace(image, stored=(image.stored - wrapped).astype(np.int16))
