"""DICOM planes: from the planes of one scan, to planes of one orientation and sense.

Rows or columns of some images may run the other way (PS3.3 C.7.6.2.1.1): the patient was turned
round in between, or a program turned the image and said so. Such an image begins at another corner
and is turned back, which is exact.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ctfm.extract.dicom import Plane
from ctfm.extract.geometry import ParallelPlanes, level_planes
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_ASIDE_MM = 50.0
"""From one plane to the next, at a right angle to the stack. Chosen: a tilted gantry moves planes
by 25 mm at most, and a header turned without its image by the whole field of view, 180 mm."""


def parallel_planes(planes: Sequence[Plane]) -> ParallelPlanes:
    """The planes of one scan, with one orientation: that of the first, or the mean of near ones.

    Planes whose rows or columns run the other way begin at another corner (`flips_of`).

    Raises:
        ScanError: `BAD_GEOMETRY` if their place is unknown, or they are not parallel.
    """
    facts = planes[0].facts
    distinct = {id(plane.facts): plane.facts for plane in planes}
    unplaced = any(plane.position_mm is None for plane in planes)
    if unplaced or any(None in (one.axes, one.pixel_mm) for one in distinct.values()):
        detail = "position, orientation or pixel size is missing or malformed"
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    if not all(one.same_grid(facts) for one in distinct.values()):
        raise ScanError(Reason.BAD_GEOMETRY, "its images have several matrices or pixel sizes")
    last = (facts.rows - 1, facts.columns - 1)
    laid = {}
    for name, one in distinct.items():
        steps, turned = (one.row_step_mm, one.column_step_mm), one.runs_against(facts)
        corner_mm = sum(turned[i] * last[i] * steps[i] for i in (0, 1))
        laid[name] = (corner_mm, *(-steps[i] if turned[i] else steps[i] for i in (0, 1)))
    corner_mm, row_mm, column_mm = (
        np.array([laid[id(plane.facts)][i] for plane in planes]) for i in (0, 1, 2)
    )
    origin_mm = np.array([plane.position_mm for plane in planes]) + corner_mm
    if corner_mm.any():
        _check_above_each_other(origin_mm, np.cross(row_mm[0], column_mm[0]))
    return level_planes(
        origin_mm,
        row_step_mm=row_mm,
        column_step_mm=column_mm,
        shape=(facts.rows, facts.columns),
    )


def _check_above_each_other(
    origin_mm: Float[np.ndarray, "z 3"], normal: Float[np.ndarray, "3"]
) -> None:
    """Refuse planes that were turned in the header alone: they then lie beside the others."""
    normal = normal / np.linalg.norm(normal)
    way_mm = np.diff(origin_mm[np.argsort(origin_mm @ normal)], axis=0)
    aside_mm = np.linalg.norm(way_mm - np.outer(way_mm @ normal, normal), axis=1)
    if aside_mm.max() > MAX_ASIDE_MM:
        detail = "rows or columns of some images run the other way, and these lie beside the others"
        raise ScanError(Reason.BAD_GEOMETRY, detail)


def flips_of(planes: Sequence[Plane]) -> list[tuple[int, ...]]:
    """The axes of each image (0 rows, 1 columns) that run against those of the first."""
    first = planes[0].facts
    distinct = {id(plane.facts): plane.facts for plane in planes}
    against = {name: one.runs_against(first) for name, one in distinct.items()}
    flips = {name: tuple(i for i in (0, 1) if turned[i]) for name, turned in against.items()}
    return [flips[id(plane.facts)] for plane in planes]
