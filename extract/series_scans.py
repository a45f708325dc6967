"""Series scans: from the planes of DICOM files, to the lines of the catalogue.

A series is one line; more if it holds several scans (`series_parts.split_planes`) or the same
images twice.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctfm.extract.choice import Candidate
from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.geometry import Stack, check_head_stack, measure_stack
from ctfm.extract.headers import stack_columns
from ctfm.extract.identity import planes_digest
from ctfm.extract.kernels import kernel_name
from ctfm.extract.series_kind import fault_of
from ctfm.extract.series_parts import split_planes
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_VENDORS = {
    "GE": r"\bge\b|general electric",
    "Siemens": r"siemens",
    "Philips": r"philips|picker|marconi|elscint",
    "Canon": r"canon|toshiba",
    "Hitachi": r"hitachi|fujifilm",
    "Neusoft": r"neusoft",
    "United Imaging": r"united imaging|\buih\b",
    "Samsung": r"samsung|neurologica",
    "Shimadzu": r"shimadzu",
}


class SeriesPlanes:
    """The planes of each series. Equal facts become one object: a cohort has millions of planes."""

    def __init__(self) -> None:
        self.planes: dict[tuple[str, str, str], list[Plane]] = defaultdict(list)
        self._facts: dict[SeriesFacts, SeriesFacts] = {}

    def add(self, planes: Iterable[Plane]) -> None:
        """Sort planes in by patient, study and series, under the originals of their ids."""
        for plane in planes:
            facts = self._facts.setdefault(plane.facts, plane.facts)
            study = facts.study or facts.series
            originals = (facts.patient or study, study, facts.series)
            self.planes[originals].append(replace(plane, facts=facts))


def series_scans(series: SeriesPlanes) -> Iterator[Candidate]:
    """The scans of every series; in each the usable ones first, then those with more files."""
    for (patient, study, name), planes in sorted(series.planes.items(), key=lambda item: item[0]):
        unique, copies = _without_copies(planes)
        ids = {"patient": patient, "study": study, "scan": name}
        scans = [_series_scan(part, ids) for part in split_planes(unique)]
        shared = _shared_files(scans)
        scans = [_refuse_shared(scan, shared) for scan in scans]
        yield from sorted(scans, key=lambda scan: (scan.reason is not Reason.OK, -len(scan.files)))
        if copies:
            yield _copies_scan(copies, ids)


def _without_copies(planes: Iterable[Plane]) -> tuple[list[Plane], list[Plane]]:
    """Part images from their copies: of one SOPInstanceUID, at one position."""
    seen: set[tuple[str, int, object]] = set()
    unique: list[Plane] = []
    copies: list[Plane] = []
    for plane in sorted(planes, key=lambda plane: (plane.file, plane.frame)):
        identity = (plane.sop, plane.frame, plane.position_mm)
        (copies if plane.sop and identity in seen else unique).append(plane)
        seen.add(identity)
    return unique, copies


def _series_scan(planes: Sequence[Plane], ids: dict[str, str]) -> Candidate:
    facts = planes[0].facts
    files = [plane.file for plane in planes]
    columns = _header_columns(planes)
    fault = fault_of(facts) or _plane_fault(planes)
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


def _plane_fault(planes: Sequence[Plane]) -> ScanError | None:
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
    facts = planes[0].facts
    positions = [plane.position_mm for plane in planes if plane.position_mm is not None]
    if len(positions) < len(planes) or facts.axes is None or facts.pixel_mm is None:
        detail = "position, orientation or pixel size is missing or malformed"
        raise ScanError(Reason.BAD_GEOMETRY, detail)
    return measure_stack(
        np.array(positions), row_step_mm=facts.row_step_mm, column_step_mm=facts.column_step_mm
    )


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


def vendor_name(manufacturer: str) -> str | None:
    """A name from a closed list: the field is free text, and the catalogue may be shared."""
    if not manufacturer:
        return None
    return next(
        (v for v, words in _VENDORS.items() if re.search(words, manufacturer, re.I)), "other"
    )
