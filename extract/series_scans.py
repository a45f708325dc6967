"""Series scans: from the planes of DICOM files, to the lines of the catalogue.

A series is one line; more if it holds several scans (`series_parts.split_planes`), images of places
that were scanned again, or the same images twice.

Which planes are one series, and whose, is told in `series_ids`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctfm.extract.choice import Candidate
from ctfm.extract.dicom import Plane
from ctfm.extract.dicom_planes import parallel_planes
from ctfm.extract.geometry import MAX_OBLIQUITY_DEG, Stack, check_head_stack, measure_stack
from ctfm.extract.headers import stack_columns
from ctfm.extract.identity import planes_digest
from ctfm.extract.kernels import kernel_name
from ctfm.extract.series_ids import (
    MAX_STEP_GAPS,
    SeriesPlanes,
    extent_mm,
    is_placed,
    n_ids,
    without_conflicts,
)
from ctfm.extract.series_kind import fault_of
from ctfm.extract.series_parts import split_planes
from ctfm.extract.series_passes import MAX_PASSES, Part
from ctfm.extract.vendors import vendor_name
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MISSING_MM = 10.0
"""A scan that is shorter than its series by more is said to be a part of it. Chosen: two slices of
5 mm, by which reconstructions of one pass may differ."""


def series_scans(series: SeriesPlanes) -> Iterator[Candidate]:
    """The scans of every series; in each the usable ones first, then those with more files."""
    for originals, planes, conflict in without_conflicts(series.planes):
        ids = dict(zip(("patient", "study", "scan"), originals, strict=True))
        if conflict:
            yield _conflict_scan(planes, ids)
            continue
        unique, copies = _without_copies(planes)
        scans = _with_notes([(part, _series_scan(part, ids)) for part in split_planes(unique)])
        shared = _shared_files(scans)
        scans = [_refuse_shared(scan, shared) for scan in scans]
        yield from sorted(scans, key=lambda scan: (scan.reason is not Reason.OK, -len(scan.files)))
        if copies:
            yield _copies_scan(copies, ids)


def _conflict_scan(planes: Sequence[Plane], ids: dict[str, str]) -> Candidate:
    patients, studies = n_ids(planes)
    detail = (
        f"its {len(planes)} images carry {patients} patient ids and {studies} study ids under one "
        "series id"
    )
    return Candidate(
        **ids,
        files=tuple(dict.fromkeys(plane.file for plane in planes)),
        format="dicom",
        reason=Reason.CONFLICTING_IDS,
        detail=detail,
        columns=_header_columns(planes),
        facts=planes[0].facts,
    )


def _without_copies(planes: Iterable[Plane]) -> tuple[list[Plane], list[Plane]]:
    """Part images from their copies, of one SOPInstanceUID at one position.

    The first by name is the image, but one that is not cut short before one that is.
    """
    ordered = sorted(planes, key=lambda plane: (plane.file, plane.frame))
    first: dict[tuple[str, int, object], Plane] = {}
    for plane in sorted(ordered, key=lambda plane: plane.truncated):
        first.setdefault((plane.sop, plane.frame, plane.position_mm), plane)
    kept = set(map(id, first.values()))
    unique = [plane for plane in ordered if not plane.sop or id(plane) in kept]
    return unique, [plane for plane in ordered if plane.sop and id(plane) not in kept]


def _series_scan(part: Part, ids: dict[str, str]) -> Candidate:
    planes = part.planes
    facts = planes[0].facts
    files = [plane.file for plane in planes]
    columns = _header_columns(planes)
    fault = fault_of(facts) or _plane_fault(part)
    try:
        stack = _stack_of(planes)
        files = [files[i] for i in stack.order]
        columns |= stack_columns(stack)
        if fault is None:
            check_head_stack(stack)
    except ScanError as error:
        fault = fault or error
    return Candidate(
        **ids,
        files=tuple(dict.fromkeys(files)),
        format="dicom",
        reason=Reason.OK if fault is None else fault.reason,
        detail="" if fault is None else fault.detail,
        columns=columns,
        facts=facts,
        digest=planes_digest(planes),
    )


def _copies_scan(planes: Sequence[Plane], ids: dict[str, str]) -> Candidate:
    return Candidate(
        **ids,
        files=tuple(dict.fromkeys(plane.file for plane in planes)),
        format="dicom",
        reason=Reason.DUPLICATE_SCAN,
        detail=f"copies of images of the same series: {len(planes)}",
        columns=_header_columns(planes),
        facts=planes[0].facts,
    )


def _plane_fault(part: Part) -> ScanError | None:
    planes = part.planes
    if part.superseded:
        detail = f"{len(planes)} images of places that were scanned again: the later ones are used"
        return ScanError(Reason.DUPLICATE_POSITIONS, detail)
    if part.passes:
        several = min(part.passes, MAX_PASSES)
        many = f"more than {several}" if part.passes > several else f"{several}"
        detail = f"{many} passes show the same places: which of them to use cannot be known"
        return ScanError(Reason.DUPLICATE_POSITIONS, detail)
    truncated = sum(plane.truncated for plane in planes)
    if truncated:
        detail = f"{truncated} of {len(planes)} images end before their pixels do"
        return ScanError(Reason.UNREADABLE, detail)
    rescales = np.array([(plane.slope, plane.intercept) for plane in planes])
    wrong = int((~np.isfinite(rescales).all(axis=1) | ~(rescales[:, 0] > 0)).sum())
    if wrong:
        detail = f"{wrong} of {len(planes)} images have no valid rescale slope and intercept"
        return ScanError(Reason.BAD_RESCALE, detail)
    return None


def _stack_of(planes: Sequence[Plane]) -> Stack:
    level = parallel_planes(planes)
    return measure_stack(
        level.origin_mm, row_step_mm=level.row_step_mm, column_step_mm=level.column_step_mm
    )


def _with_notes(scans: Sequence[tuple[Part, Candidate]]) -> list[Candidate]:
    """Say of usable scans what a later image took the place of, and what of the head they lack."""
    heads = []
    if len(scans) > 1:
        heads = [extent_mm(part.planes) for part, _ in scans if _may_be_head(part.planes)]
    noted = []
    for part, scan in scans:
        notes = []
        if scan.reason is Reason.OK:
            notes = [*_note_on_replaced(part.replaced), *_note_on_missing(part.planes, scan, heads)]
        noted.append(replace(scan, detail="; ".join(notes)) if notes else scan)
    return noted


def _note_on_replaced(n: int) -> list[str]:
    if n == 0:
        return []
    several = f"{n} images were scanned again: the later ones are used"
    return ["1 image was scanned again: the later one is used" if n == 1 else several]


def _note_on_missing(
    planes: Sequence[Plane], scan: Candidate, heads: Sequence[tuple[float, float]]
) -> list[str]:
    if len(heads) < 2:
        return []
    low, high = extent_mm(planes)
    all_mm = max(one[1] for one in heads) - min(one[0] for one in heads)
    if all_mm - (high - low) <= max(MISSING_MM, MAX_STEP_GAPS * scan.columns["spacing_z_max_mm"]):
        return []
    part = f"it covers {high - low:.0f} of the {all_mm:.0f} mm of its series"
    return [f"{part}: the rest is in other lines"]


def _may_be_head(planes: Sequence[Plane]) -> bool:
    placed = all(map(is_placed, planes))
    return placed and fault_of(planes[0].facts) is None and _is_axial(planes)


def _is_axial(planes: Sequence[Plane]) -> bool:
    facts = planes[0].facts
    assert facts.axes is not None
    normal = np.cross(facts.axes[:3], facts.axes[3:])
    return bool(abs(normal[2]) >= np.cos(np.radians(MAX_OBLIQUITY_DEG)))


def _shared_files(scans: Iterable[Candidate]) -> set[str]:
    counts = Counter(file for scan in scans for file in scan.files)
    return {file for file, count in counts.items() if count > 1}


def _refuse_shared(scan: Candidate, shared: set[str]) -> Candidate:
    if scan.reason is not Reason.OK or shared.isdisjoint(scan.files):
        return scan
    detail = "its frames are in one object with those of another stack: split the object"
    return replace(scan, reason=Reason.UNSUPPORTED_ENCODING, detail=detail)


def _header_columns(planes: Sequence[Plane]) -> dict[str, Any]:
    facts = planes[0].facts
    row_mm, column_mm = facts.pixel_mm or (None, None)
    return {
        "n_slices": len(planes) if facts.has_pixels else None,
        "rows": facts.rows or None,
        "columns": facts.columns or None,
        "spacing_x_mm": column_mm,
        "spacing_y_mm": row_mm,
        "thickness_mm": _median(plane.thickness_mm for plane in planes),
        "vendor": vendor_name(facts.vendor),
        "kernel": kernel_name(facts.kernel),
        "kvp": _median(plane.kvp for plane in planes),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
