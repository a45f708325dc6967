"""Pixel signs: from stored values that a header calls unsigned, to those of them that are negative.

A part of RSNA 2019 is so: nothing of a scan is below -200 HU as the header has it, and with the
highest stored bit as a sign, much is air.

Axes: z slices, y rows, x columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from ctfm.extract.dicom import Plane

AIR_HU = (-1100.0, -800.0)
NO_AIR_HU = -200.0
MIN_AIR_SHARE = 0.05
"""A scan of a head has 30% to 60% where the field of view holds it, 10% in a narrow one."""
MAX_METAL_SHARE = 0.01


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

    Air is in every scan of a head. Here nothing is air as long as the values are unsigned, and
    with their highest bit as a sign much is. What then lies below air is one value of padding; the
    little else is metal, whose values reach into that bit. A picture with inverted grey levels, or
    air clipped to 0 beside metal, is not so.

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
    n, values = counts.sum(), np.arange(1 << bits)
    has_bit = values >= 1 << (bits - 1)
    hu = images[0].hu_of(values - (1 << bits))
    air = has_bit & (hu >= AIR_HU[0]) & (hu <= AIR_HU[1])
    below = np.where(has_bit & (hu < AIR_HU[0]), counts, 0)
    padding = (below == below.max()) & (below > MAX_METAL_SHARE * n)
    if counts[air].sum() < MIN_AIR_SHARE * n or below[~padding].sum() > MAX_METAL_SHARE * n:
        return None
    negative: Bool[np.ndarray, " values"] = has_bit & ((hu >= AIR_HU[0]) | padding | (bits == 16))
    return negative


def with_signs(image: StoredImage, negative: Bool[np.ndarray, " values"]) -> StoredImage:
    wrapped = np.where(negative[image.stored], len(negative), 0)
    return replace(image, stored=(image.stored - wrapped).astype(np.int16))
