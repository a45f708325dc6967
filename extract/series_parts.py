"""Series parts: from the planes of one DICOM series, to those that can be one scan.

A scan is one reconstruction of one pass over the head. Sources: PS3.3 C.7.6.2 (image plane) and
C.8.2.1 (CT image: ConvolutionKernel, AcquisitionNumber, ImageType).

1. Images of another kind (a localizer in the series), matrix, pixel size or orientation are never
   of one scan. Orientations up to 2° apart are noise, unless each has a whole stack of its own.
2. Kernels, image types and slice thicknesses are reconstructions of their own where they show one
   place twice. Where they complement each other (they change on the way up), they are one scan:
   also where two acquisitions, or two thicknesses, overlap in less than half of the shorter stack.
3. Acquisitions are joined, but for those that show the same places (`series_passes`).
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float

from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.geometry import (
    MIN_COVERAGE_MM,
    MIN_SLICES,
    SAME_POSITION_MM,
    SAME_STEP,
    lost_slices,
)
from ctfm.extract.series_kind import kind_of
from ctfm.extract.series_passes import MAX_GAP_PER_THICKNESS, Part, depth_of, split_passes

MAX_SHARED = 0.1
"""A reconstruction joins another if no more of its places lie there too; one always may. Chosen: a
seam of two blocks is a slice or two of some thirty."""


def split_planes(planes: Sequence[Plane]) -> list[Part]:
    """Part the planes of one series into those that can be one scan, by their first plane."""
    parts = []
    place_of = {id(plane): i for i, plane in enumerate(planes)}
    for alike in _alike(planes):
        if any(plane.position_mm is None for plane in alike) or alike[0].facts.axes is None:
            parts.append(Part(planes=alike))
            continue
        scans = [part for scan in _reconstructions(alike) for part in split_passes(scan)]
        # Their order numbers the ids of equal ones, so it must not hang on how they were parted.
        first = [min(place_of[id(plane)] for plane in part.planes) for part in scans]
        order = sorted(range(len(scans)), key=lambda i: (scans[i].superseded, first[i]))
        parts += [scans[i] for i in order]
    return parts


def _are_alike(first: SeriesFacts, second: SeriesFacts) -> bool:
    same_kind = kind_of(first) is kind_of(second)
    return same_kind and first.same_grid(second) and first.nearly_parallel(second)


def _alike(planes: Sequence[Plane]) -> list[list[Plane]]:
    """Group planes by their facts, of which there are few objects in a series."""
    groups: list[list[Plane]] = []
    known: dict[int, list[Plane]] = {}
    for plane in planes:
        group = known.get(id(plane.facts))
        if group is None:
            found = (one for one in groups if _are_alike(one[0].facts, plane.facts))
            group = next(found, [])
            if not group:
                groups.append(group)
            known[id(plane.facts)] = group
        group.append(plane)
    return groups


def _reconstructions(planes: list[Plane]) -> list[list[Plane]]:
    scans = [planes]
    for key, compete in _KEYS:
        scans = [part for scan in scans for part in _joined(scan, key, compete)]
    return scans


def _by_key(planes: list[Plane], key: Callable[[Plane], Hashable]) -> list[list[Plane]]:
    groups: dict[Hashable, list[Plane]] = {}
    for plane in planes:
        groups.setdefault(key(plane), []).append(plane)
    return list(groups.values())


def _joined(
    planes: list[Plane], key: Callable[[Plane], Hashable], compete: Callable[..., bool]
) -> list[list[Plane]]:
    """Join groups that complement each other; those that show the same places stay apart."""
    groups = _by_key(planes, key)
    if len(groups) == 1:
        return [planes]
    scans: list[list[Plane]] = []
    for group in groups:
        scan = next((one for one in scans if not compete(one, group)), None)
        if scan is None:
            scans.append(list(group))
        else:
            scan += group
    return scans if len(scans) > 1 else [planes]


def _compete(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    acquired = [{plane.acquisition for plane in planes} for planes in (some, others)]
    if acquired[0].isdisjoint(acquired[1]):
        return _compete_in_thickness(some, others)
    return _share_places(some, others) or _are_both_whole(some, others)


def _compete_in_thickness(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    """Stacks of which one goes on where the other ends do not compete where they overlap."""
    shared = _share_places(some, others) and not _go_on(some, others)
    return shared or _are_both_whole(some, others)


def _share_places(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    first, second = _depths(some), _depths(others, along=some[0].facts)
    shared, shorter = _n_shared(first, second), min(len(first), len(second))
    return shared > max(1, MAX_SHARED * shorter) or shared >= shorter


def _go_on(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    """Whether each reaches beyond the other, by more than the half of the shorter one."""
    first, second = _depths(some), _depths(others, along=some[0].facts)
    lower, upper = sorted([first, second], key=lambda depth_mm: float(depth_mm[0]))
    together_mm = lower[-1] - upper[0]
    return bool(lower[-1] < upper[-1] and 2 * together_mm < min(np.ptp(lower), np.ptp(upper)))


def _are_both_whole(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    """Whether each is a stack by itself of about the same part of the body."""
    if min(len(some), len(others)) < MIN_SLICES:
        return False
    first, second = _depths(some), _depths(others, along=some[0].facts)
    together_mm = min(first[-1], second[-1]) - max(first[0], second[0])
    shorter_mm = min(np.ptp(first), np.ptp(second))
    return bool(
        2 * together_mm > shorter_mm and _is_whole(some, first) and _is_whole(others, second)
    )


def is_stack(planes: Sequence[Plane]) -> bool:
    """Whether planes, all with a place, are a stack by themselves, without holes for others."""
    return len(planes) >= MIN_SLICES and _is_whole(planes, _depths(planes))


def _is_whole(planes: Sequence[Plane], depth_mm: Float[np.ndarray, " z"]) -> bool:
    """Whether planes are a stack by themselves, without holes that others may fill."""
    gap_mm = np.diff(depth_mm)
    if np.ptp(depth_mm) < MIN_COVERAGE_MM:
        return False
    if gap_mm.min() < SAME_POSITION_MM or lost_slices(gap_mm):
        return False
    known_mm = [plane.thickness_mm for plane in planes if plane.thickness_mm is not None]
    most_mm = MAX_GAP_PER_THICKNESS * np.median(known_mm) if known_mm else np.inf
    return bool(np.median(gap_mm) <= most_mm)


def _orientation(plane: Plane) -> tuple[int, ...]:
    return tuple(round(value / SAME_STEP) for value in plane.facts.axes or ())


_KEYS: tuple[tuple[Callable[[Plane], Hashable], Callable[..., bool]], ...] = (
    (_orientation, _are_both_whole),  # of noise, a place that is there twice says nothing
    (lambda plane: plane.facts.kernel, _compete),
    (lambda plane: plane.facts.image_type, _compete),
    (lambda plane: plane.thickness_mm, _compete_in_thickness),
)


def _n_shared(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"]) -> int:
    """How many of the second lie at one of the first; both sorted."""
    near = np.searchsorted(first, second - SAME_POSITION_MM, side="right")
    upto = np.searchsorted(first, second + SAME_POSITION_MM, side="left")
    return int((near < upto).sum())


def _depths(
    planes: Sequence[Plane], *, along: SeriesFacts | None = None
) -> Float[np.ndarray, " z"]:
    return np.sort(depth_of(planes, along or planes[0].facts))
