"""Series parts: from the planes of one DICOM series, to those that can be one scan."""

from collections.abc import Callable, Sequence
from typing import Any

from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.geometry import MIN_SLICES
from ctfm.extract.series_kind import kind_of
from ctfm.store.reasons import Reason


def split_planes(planes: Sequence[Plane]) -> list[list[Plane]]:
    """Part the planes of one series into those that can be one scan.

    Images of another kind (a localizer in the series), matrix, pixel size or orientation are
    never of one scan. Kernel, acquisition and image type part a series only where it has several
    images at one position, and only if that leaves one image at each.
    """
    parts: list[list[Plane]] = []
    seen: list[tuple[SeriesFacts, Reason]] = []
    for plane in planes:
        kind = kind_of(plane.facts)
        for part, (facts, other_kind) in zip(parts, seen, strict=True):
            if kind is other_kind and plane.facts.same_plane(facts):
                part.append(plane)
                break
        else:
            parts.append([plane])
            seen.append((plane.facts, kind))
    return [scan for part in parts for scan in _split_repeats(part)]


def _split_repeats(planes: list[Plane]) -> list[list[Plane]]:
    if not _repeats(planes):
        return [planes]
    for key in _SPLIT_KEYS:
        parts: dict[Any, list[Plane]] = {}
        for plane in planes:
            parts.setdefault(key(plane), []).append(plane)
        if len(parts) > 1 and all(_is_whole(part) for part in parts.values()):
            return list(parts.values())
    return [planes]


def _is_whole(planes: Sequence[Plane]) -> bool:
    return len(planes) >= MIN_SLICES and not _repeats(planes)


def _repeats(planes: Sequence[Plane]) -> bool:
    positions = [plane.position_mm for plane in planes]
    return None not in positions and len(set(positions)) < len(positions)


_SPLIT_KEYS: tuple[Callable[[Plane], object], ...] = (
    lambda plane: plane.facts.kernel,
    lambda plane: plane.facts.image_type,
    lambda plane: plane.acquisition,
    lambda plane: (plane.facts.kernel, plane.facts.image_type, plane.acquisition),
)
