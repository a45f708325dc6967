"""Geometry: from the positions of image planes, to their order, spacing, gaps and tilt.

Everything follows from position and orientation (DICOM PS3.3 C.7.6.2.1.1, or an affine), nothing
from tags that repeat or contradict them: `SliceThickness`, `SpacingBetweenSlices`, `SliceLocation`
and `GantryDetectorTilt` are not read here. Uneven spacing is normal (4 mm, then 7 mm) and is kept;
a lost slice in an even stack is not.

World coordinates are RAS millimetres.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

SAME_POSITION_MM = 0.05
"""Planes that lie closer than this are at one position."""
SAME_GAP_RATIO = 1.3
"""Neighbouring gaps up to this ratio belong to one evenly spaced run."""
LOST_SLICE_RATIO = 1.6
"""A gap this much larger than those around it has lost a slice."""
SAME_STEP = 0.005
"""Steps that differ by less, in pixels, are those of parallel planes."""
MAX_TURN_DEG = 2.0
"""Orientations of one stack may lie so far apart: 1.9 mm at the edge of a head about their mean."""
MAX_GAP_MM = 25.0
MAX_TILT_DEG = 45.0
MAX_OBLIQUITY_DEG = 40.0
MIN_SLICES = 4
MIN_COVERAGE_MM = 30.0
PIXEL_RANGE_MM = (0.05, 10.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Parallel image planes, ordered feet to head along their normal."""

    order: Int[np.ndarray, " z"]
    """Index of each plane as it was given, in the order of the stack."""

    gap_mm: Float[np.ndarray, " gaps"]
    """Distance of neighbouring planes along the normal; one fewer than planes."""

    tilt_deg: float
    """Angle between the normal and the way from plane to plane: the gantry's tilt, a shear.
    Positive if the front edge of a slice is higher than it would be without tilt."""

    obliquity_deg: float
    """Angle between the normal and the patient's long axis."""

    @property
    def spacing_mm(self) -> float:
        """Median gap; 0 for a single plane."""
        return float(np.median(self.gap_mm)) if self.gap_mm.size else 0.0

    @property
    def coverage_mm(self) -> float:
        """First to last plane."""
        return float(self.gap_mm.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class ParallelPlanes:
    """Planes of one orientation; RAS mm."""

    origin_mm: Float[np.ndarray, "z 3"]
    row_step_mm: Float[np.ndarray, "3"]
    column_step_mm: Float[np.ndarray, "3"]


def level_planes(
    origin_mm: Float[np.ndarray, "z 3"],
    *,
    row_step_mm: Float[np.ndarray, "z 3"],
    column_step_mm: Float[np.ndarray, "z 3"],
    shape: tuple[int, int],
) -> ParallelPlanes:
    """Give planes whose orientations differ by noise the mean of them.

    A plane is turned about its middle or about its first voxel, whichever leaves the stack more
    even: some scanners write a measured angle about the isocentre, some tools rounded ones.

    Args:
        origin_mm: The first voxel of each plane.
        row_step_mm: From one row to the next, in each plane.
        column_step_mm: From one column to the next, in each plane.
        shape: Rows and columns.

    Raises:
        ScanError: `BAD_GEOMETRY` if they are farther apart than noise.
    """
    steps = np.stack([row_step_mm, column_step_mm], axis=1)
    sizes = np.linalg.norm(steps[0], axis=1, keepdims=True)
    mean = steps.mean(axis=0)
    mean *= sizes / np.linalg.norm(mean, axis=1, keepdims=True)
    apart = np.linalg.norm(steps - mean, axis=2) / sizes[:, 0]
    if apart.max() > 2 * np.radians(MAX_TURN_DEG):
        raise ScanError(Reason.BAD_GEOMETRY, "its images are not parallel")
    if np.abs(steps - steps[0]).max() < SAME_STEP * sizes.max():
        return ParallelPlanes(
            origin_mm=origin_mm, row_step_mm=steps[0, 0], column_step_mm=steps[0, 1]
        )
    to_middle = (np.array(shape) - 1) / 2
    turned_mm = origin_mm + np.einsum("s, z s k -> z k", to_middle, steps - mean)
    normal = np.cross(*mean)
    level_mm = min(origin_mm, turned_mm, key=lambda mm: _unevenness(mm @ normal))
    return ParallelPlanes(origin_mm=level_mm, row_step_mm=mean[0], column_step_mm=mean[1])


def _unevenness(depth_mm: Float[np.ndarray, " z"]) -> float:
    return float(np.abs(np.diff(np.sort(depth_mm), n=2)).sum())


def measure_stack(
    origin_mm: Float[np.ndarray, "z 3"],
    *,
    row_step_mm: Float[np.ndarray, "3"],
    column_step_mm: Float[np.ndarray, "3"],
) -> Stack:
    """Order parallel planes and measure how they lie.

    Args:
        origin_mm: The same corner of each plane, in any order.
        row_step_mm: From one row to the next.
        column_step_mm: From one column to the next.

    Raises:
        ScanError: `BAD_GEOMETRY` if the steps are not those of a rectangular image.
    """
    _check_plane(row_step_mm, column_step_mm)
    normal = np.cross(row_step_mm, column_step_mm)
    normal /= np.linalg.norm(normal)
    normal *= np.sign(normal[np.abs(normal).argmax()])
    depth_mm = origin_mm @ normal
    order = np.argsort(depth_mm, kind="stable")
    return Stack(
        order=order,
        gap_mm=np.diff(depth_mm[order]),
        tilt_deg=_tilt_deg(origin_mm[order], normal),
        obliquity_deg=float(np.degrees(np.arccos(min(1.0, abs(normal[2]))))),
    )


def check_order(stack: Stack) -> None:
    """Refuse a stack that is no volume.

    Raises:
        ScanError: `DUPLICATE_POSITIONS`, `MISSING_SLICES` or `BAD_GEOMETRY`.
    """
    duplicates = int((stack.gap_mm < SAME_POSITION_MM).sum())
    if duplicates:
        n = len(stack.order)
        detail = f"its {n} images lie at fewer positions, {n - duplicates}"
        raise ScanError(Reason.DUPLICATE_POSITIONS, detail)
    lost = lost_slices(stack.gap_mm)
    if lost:
        where = ", ".join(f"{stack.gap_mm[i]:.4g} mm after slice {i + 1}" for i in lost[:3])
        gaps = "1 gap is" if len(lost) == 1 else f"{len(lost)} gaps are"
        detail = f"{gaps} too large for the slices around them: {where}"
        if _lie_between(stack.gap_mm, lost):
            detail += "; others are as large: images of two reconstructions or passes may alternate"
        raise ScanError(Reason.MISSING_SLICES, detail)
    if abs(stack.tilt_deg) > MAX_TILT_DEG:
        detail = f"the slices shift sideways as if tilted by {stack.tilt_deg:.0f} degrees"
        raise ScanError(Reason.BAD_GEOMETRY, detail)


def check_head_stack(stack: Stack) -> None:
    """Refuse a stack that is not axial, or too short for a head.

    Raises:
        ScanError: `NOT_AXIAL`, `TOO_FEW_SLICES`, and those of `check_order`.
    """
    if stack.obliquity_deg > MAX_OBLIQUITY_DEG:
        detail = f"its planes are {stack.obliquity_deg:.0f} degrees off the axial one"
        raise ScanError(Reason.NOT_AXIAL, detail)
    check_order(stack)
    n = len(stack.order)
    covered_mm = stack.coverage_mm + stack.spacing_mm
    if n < MIN_SLICES or covered_mm < MIN_COVERAGE_MM:
        slices = "1 slice" if n == 1 else f"{n} slices"
        needed = f"{MIN_SLICES} over {MIN_COVERAGE_MM:g} mm are needed"
        raise ScanError(Reason.TOO_FEW_SLICES, f"{slices} over {covered_mm:.4g} mm; {needed}")


def lost_slices(gap_mm: Float[np.ndarray, " gaps"]) -> list[int]:
    """The gaps in which a slice is missing.

    Gaps are first joined to runs of similar ones. A run has lost slices if it is clearly larger
    than both runs beside it and than the three gaps on either side. At an end of the stack only a
    single gap can be told from a change of the spacing.

    Args:
        gap_mm: Distances of neighbouring slices, all positive.
    """
    runs = _even_runs(gap_mm)
    lost = [i for i, gap in enumerate(gap_mm) if gap > MAX_GAP_MM]
    for r, (start, stop) in enumerate(runs):
        beside = [
            float(np.median(gap_mm[slice(*runs[n])])) for n in (r - 1, r + 1) if 0 <= n < len(runs)
        ]
        at_an_end = len(beside) == 1
        if not beside or (at_an_end and stop - start > 1):
            continue
        around = np.concatenate([gap_mm[max(0, start - 3) : start], gap_mm[stop : stop + 3]])
        usual_mm = max(*beside, float(np.median(around)))
        if np.median(gap_mm[start:stop]) >= LOST_SLICE_RATIO * usual_mm:
            lost += range(start, stop)
    return sorted(set(lost))


def _lie_between(gap_mm: Float[np.ndarray, " gaps"], lost: Sequence[int]) -> bool:
    """Whether slices are rather too many: where some are lost, their gap is the largest."""
    others_mm = np.delete(gap_mm, lost)
    largest_mm = max(others_mm, default=0.0) + SAME_POSITION_MM
    return len(lost) > 1 and bool(gap_mm[lost].max() <= largest_mm)


def _even_runs(gap_mm: Float[np.ndarray, " gaps"]) -> Sequence[tuple[int, int]]:
    ratios = gap_mm[1:] / gap_mm[:-1]
    uneven = np.maximum(ratios, 1 / ratios) > SAME_GAP_RATIO
    edges = [0, *(np.flatnonzero(uneven) + 1).tolist(), len(gap_mm)]
    return [(start, stop) for start, stop in pairwise(edges) if stop > start]


def _tilt_deg(origin_mm: Float[np.ndarray, "z 3"], normal: Float[np.ndarray, "3"]) -> float:
    steps = np.diff(origin_mm, axis=0)
    forward = steps @ normal
    if not (forward >= SAME_POSITION_MM).any():
        return 0.0
    steps, forward = steps[forward >= SAME_POSITION_MM], forward[forward >= SAME_POSITION_MM]
    # The median ignores the jump where two blocks with other centres meet.
    drift = np.median((steps - forward[:, None] * normal) / forward[:, None], axis=0)
    sign = -1.0 if drift[1] < 0 else 1.0
    return float(sign * np.degrees(np.arctan(np.linalg.norm(drift))))


def _check_plane(
    row_step_mm: Float[np.ndarray, "3"], column_step_mm: Float[np.ndarray, "3"]
) -> None:
    sizes = np.array([np.linalg.norm(row_step_mm), np.linalg.norm(column_step_mm)])
    low, high = PIXEL_RANGE_MM
    if not (np.isfinite(sizes).all() and (sizes >= low).all() and (sizes <= high).all()):
        detail = f"a pixel size outside {low:g} to {high:g} mm"
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    if abs(row_step_mm @ column_step_mm) > 0.02 * sizes.prod():
        raise ScanError(Reason.BAD_GEOMETRY, "rows and columns are not at right angles")
