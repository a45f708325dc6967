"""Series parts: from the planes of one DICOM series, to those that can be one scan.

A scan is one reconstruction of one pass over the head. Sources: PS3.3 C.7.6.2 (image plane) and
C.8.2.1 (CT image: ConvolutionKernel, AcquisitionNumber, ImageType).

1. Images of another kind (a localizer in the series), matrix, pixel size or orientation are never
   of one scan. Orientations up to 2° apart are noise, unless each has a whole stack of its own.
2. Kernels, image types and slice thicknesses are reconstructions of their own where they show one
   place twice. Where they complement each other (they change on the way up), they are one scan.
3. Acquisitions are joined, too. Where they share some places, those were scanned again, mostly
   because the patient had moved: the later image is used. Where they share half of the places or
   more, or where each has a whole stack of its own between the places of the other, they are
   passes over the same head, each a scan. More than three passes over a place are a dynamic run,
   and nothing is chosen from it.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.dicom_values import as_whole
from ctfm.extract.geometry import (
    MIN_COVERAGE_MM,
    MIN_SLICES,
    SAME_POSITION_MM,
    SAME_STEP,
    lost_slices,
)
from ctfm.extract.series_kind import kind_of

MAX_PASSES = 3
MAX_SHARED = 0.1
"""Of the places of a reconstruction, so many (and always one) may lie in another that it joins."""
MAX_GAP_PER_THICKNESS = 1.5
"""A stack with larger gaps has holes, which another part of its series may fill."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Planes of a series that are one scan, or are none because later ones took their place."""

    planes: list[Plane]
    replaced: int = 0
    """Images of the same places that were scanned before and are not among the planes."""
    superseded: bool = False


def split_planes(planes: Sequence[Plane]) -> list[Part]:
    """Part the planes of one series into those that can be one scan, by their first plane."""
    parts = []
    place_of = {id(plane): i for i, plane in enumerate(planes)}
    for alike in _alike(planes):
        if any(plane.position_mm is None for plane in alike) or alike[0].facts.axes is None:
            parts.append(Part(planes=alike))
            continue
        scans = [part for scan in _reconstructions(alike) for part in _passes(scan)]
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
    first, second = _depths(some), _depths(others, along=some[0].facts)
    shared, shorter = _n_shared(first, second), min(len(first), len(second))
    if shared > max(1, MAX_SHARED * shorter) or shared >= shorter:
        return True
    return _are_both_whole(some, others)


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


def _are_passes_beside(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    """Whether both are whole, and no image of one takes the place of one of the other."""
    if not _are_both_whole(some, others):
        return False
    return not _n_shared(_depths(some), _depths(others, along=some[0].facts))


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
    (lambda plane: plane.thickness_mm, _compete),
    (lambda plane: plane.acquisition, _are_passes_beside),
)


def _passes(planes: list[Plane]) -> list[Part]:
    places = _places(planes)
    shared = sum(len(images) > 1 for images in places)
    if not shared:
        return [Part(planes=planes)]
    passes = _disjoint_passes(planes)
    if passes is None or not 1 < len(passes) <= MAX_PASSES:
        return [Part(planes=planes)]
    if 2 * shared >= len(places):
        return [Part(planes=one) for one in passes]
    if any(_number(plane) is None for plane in planes):
        return [Part(planes=planes)]  # which is the later one cannot be known
    latest = [max(images, key=lambda plane: _number(plane) or 0) for images in places]
    kept = {id(plane) for plane in latest}
    before = [plane for plane in planes if id(plane) not in kept]
    used = [plane for plane in planes if id(plane) in kept]
    return [
        Part(planes=used, replaced=len(before)),
        Part(planes=before, superseded=True),
    ]


def _number(plane: Plane) -> int | None:
    return as_whole(plane.acquisition)


def _disjoint_passes(planes: list[Plane]) -> list[list[Plane]] | None:
    """Acquisitions in their order, each joined to the last pass with which it shares no place.

    None if an acquisition has several images of one place.
    """
    groups = _by_key(planes, lambda plane: plane.acquisition)
    groups.sort(key=lambda group: (_number(group[0]) or 0, group[0].acquisition))
    along = planes[0].facts
    passes: list[list[Plane]] = []
    for group in groups:
        depth_mm = _depths(group, along=along)
        if (np.diff(depth_mm) < SAME_POSITION_MM).any():
            return None
        for one in reversed(passes):
            if not _n_shared(_depths(one, along=along), depth_mm):
                one += group
                break
        else:
            passes.append(list(group))
    return passes


def _places(planes: Sequence[Plane]) -> list[list[Plane]]:
    """The images of each place along the stack."""
    depth_mm = _depth_of(planes, planes[0].facts)
    places: list[list[Plane]] = []
    last_mm = -np.inf
    for i in np.argsort(depth_mm, kind="stable").tolist():
        if depth_mm[i] - last_mm < SAME_POSITION_MM:
            places[-1].append(planes[i])
        else:
            places.append([planes[i]])
        last_mm = depth_mm[i]
    return places


def _n_shared(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"]) -> int:
    """How many of the second lie at one of the first; both sorted."""
    near = np.searchsorted(first, second - SAME_POSITION_MM, side="right")
    upto = np.searchsorted(first, second + SAME_POSITION_MM, side="left")
    return int((near < upto).sum())


def _depths(
    planes: Sequence[Plane], *, along: SeriesFacts | None = None
) -> Float[np.ndarray, " z"]:
    return np.sort(_depth_of(planes, along or planes[0].facts))


def _depth_of(planes: Sequence[Plane], along: SeriesFacts) -> Float[np.ndarray, " z"]:
    assert along.axes is not None
    normal = np.cross(along.axes[:3], along.axes[3:])
    positions = np.array([plane.position_mm for plane in planes], dtype=float)
    depth_mm: Float[np.ndarray, " z"] = positions @ normal
    return depth_mm
