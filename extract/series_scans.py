"""Series scans: from the planes of DICOM files, to the lines of the catalogue.

A series is one line; more if it holds several scans (`series_parts.split_planes`), images of places
that were scanned again, or the same images twice.

A SeriesInstanceUID belongs to one study of one patient (PS3.3 A.1.2). Where images of one series
carry other ids, they are one line of `conflicting_ids`: whose head it is cannot be known, and two
lines would be one patient in two splits. Ids that differ in case, blanks or leading zeros, and
empty ones, do not conflict. Some anonymisers give one SeriesInstanceUID to whole cohorts: images
that share no study and no object, and do not complement each other, stay apart.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctfm.extract.choice import Candidate
from ctfm.extract.dicom import Plane, SeriesFacts, parallel_planes
from ctfm.extract.geometry import MAX_OBLIQUITY_DEG, Stack, check_head_stack, measure_stack
from ctfm.extract.headers import stack_columns
from ctfm.extract.identity import planes_digest
from ctfm.extract.kernels import kernel_name
from ctfm.extract.series_kind import fault_of
from ctfm.extract.series_parts import Part, split_planes
from ctfm.extract.vendors import vendor_name
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

MAX_STEP_GAPS = 1.5
"""So many gaps between slices may lie between two stacks of which one goes on in the other."""
MISSING_MM = 10.0
"""That a scan may be shorter than its series before it is said to be a part of it."""


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


Originals = tuple[str, str, str]
"""Patient, study and series, as the headers have them."""


def series_scans(series: SeriesPlanes) -> Iterator[Candidate]:
    """The scans of every series; in each the usable ones first, then those with more files."""
    for originals, planes, conflict in _without_conflicts(series.planes):
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


def _without_conflicts(
    series: Mapping[Originals, list[Plane]],
) -> Iterator[tuple[Originals, list[Plane], bool]]:
    """Join what is one series under several ids; whether these ids conflict."""
    by_series: dict[tuple[str, bool], list[Originals]] = defaultdict(list)
    for originals in sorted(series):
        folder = series[originals][0].facts.series_is_folder
        by_series[originals[2], folder].append(originals)
    for (_, folder), several in by_series.items():
        alone = len(several) == 1 or folder
        for one_series in [[one] for one in several] if alone else _joined(several, series):
            planes = [plane for one in one_series for plane in series[one]]
            yield _fullest(one_series, series), planes, _ids_conflict(planes)


def _joined(
    several: Sequence[Originals], series: Mapping[Originals, list[Plane]]
) -> list[list[Originals]]:
    """Group ids that share a study or an object, or whose stacks complement each other."""
    links = list(_continuations([series[one] for one in several]))
    first_of: dict[tuple[str, str], int] = {}
    # For want of an original id, the study is named by its series.
    unnamed = any(study == name for _, study, name in several)
    for i, (patient, study, _) in enumerate(several):
        tokens = {("object", plane.sop) for plane in series[several[i]] if plane.sop}
        tokens |= {("study", study), *([("patient", _plain_id(patient))] if unnamed else [])}
        links += [(first_of.setdefault(token, i), i) for token in tokens]
    n = len(several)
    ends = np.array(links).T
    _, label = connected_components(coo_array((np.ones(len(links)), (ends[0], ends[1])), (n, n)))
    groups: dict[int, list[Originals]] = defaultdict(list)
    for one, number in zip(several, label.tolist(), strict=True):
        groups[number].append(one)
    return list(groups.values())


def _continuations(stacks: Sequence[Sequence[Plane]]) -> Iterator[tuple[int, int]]:
    """Pairs of stacks of which one begins about where the other ends, or fills its holes."""
    ends = sorted(
        (*_extent_mm(stack), i)
        for i, stack in enumerate(stacks)
        if len(stack) > 1 and all(map(_is_placed, stack))
    )
    lows = [low for low, _, _ in ends]
    for low, high, i in ends:
        gap_mm = (high - low) / (len(stacks[i]) - 1)
        places = [high]
        if gap_mm > MAX_STEP_GAPS * (_median(plane.thickness_mm for plane in stacks[i]) or gap_mm):
            places.append(low)
        for place in places:
            first = bisect_left(lows, place - MAX_STEP_GAPS * gap_mm)
            last = bisect_right(lows, place + MAX_STEP_GAPS * gap_mm)
            others = [j for _, _, j in ends[first:last]]
            yield from ((i, j) for j in others if _lie_alike(stacks[i], stacks[j]))


def _is_placed(plane: Plane) -> bool:
    return None not in (plane.position_mm, plane.facts.axes, plane.facts.pixel_mm)


def _lie_alike(some: Sequence[Plane], others: Sequence[Plane]) -> bool:
    one, other = some[0], others[0]
    assert one.position_mm is not None
    assert other.position_mm is not None
    aside_mm = abs(one.position_mm[0] - other.position_mm[0])
    return (
        aside_mm < 1 and one.facts.same_grid(other.facts) and one.facts.nearly_parallel(other.facts)
    )


def _fullest(several: Sequence[Originals], series: Mapping[Originals, list[Plane]]) -> Originals:
    """The ids of most images, of which none is made up for want of an original one."""
    return min(
        several, key=lambda one: (one[0] == one[1], one[1] == one[2], -len(series[one]), one)
    )


def _ids_conflict(planes: Iterable[Plane]) -> bool:
    patients, studies = _n_ids(planes)
    return patients > 1 or studies > 1


def _n_ids(planes: Iterable[Plane]) -> tuple[int, int]:
    """How many patients and studies; ids that are empty, or spelled otherwise, do not count."""
    facts = {id(plane.facts): plane.facts for plane in planes}.values()
    patients = {_plain_id(one.patient) for one in facts} - {""}
    studies = {one.study for one in facts} - {""}
    return len(patients), len(studies)


def _plain_id(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold().lstrip("0")


def _conflict_scan(planes: Sequence[Plane], ids: dict[str, str]) -> Candidate:
    patients, studies = _n_ids(planes)
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
    """Part images from their copies: of one SOPInstanceUID, at one position."""
    seen: set[tuple[str, int, object]] = set()
    unique: list[Plane] = []
    copies: list[Plane] = []
    for plane in sorted(planes, key=lambda plane: (plane.file, plane.frame)):
        identity = (plane.sop, plane.frame, plane.position_mm)
        (copies if plane.sop and identity in seen else unique).append(plane)
        seen.add(identity)
    return unique, copies


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
        heads = [_extent_mm(part.planes) for part, _ in scans if _may_be_head(part.planes)]
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
    low, high = _extent_mm(planes)
    all_mm = max(one[1] for one in heads) - min(one[0] for one in heads)
    if all_mm - (high - low) <= max(MISSING_MM, MAX_STEP_GAPS * scan.columns["spacing_z_max_mm"]):
        return []
    part = f"it covers {high - low:.0f} of the {all_mm:.0f} mm of its series"
    return [f"{part}: the rest is in other lines"]


def _may_be_head(planes: Sequence[Plane]) -> bool:
    placed = all(map(_is_placed, planes))
    return placed and fault_of(planes[0].facts) is None and _is_axial(planes)


def _is_axial(planes: Sequence[Plane]) -> bool:
    facts = planes[0].facts
    assert facts.axes is not None
    normal = np.cross(facts.axes[:3], facts.axes[3:])
    return bool(abs(normal[2]) >= np.cos(np.radians(MAX_OBLIQUITY_DEG)))


def _extent_mm(planes: Sequence[Plane]) -> tuple[float, float]:
    """Height of the middles of the lowest and the highest plane; all have a place."""
    heights = []
    for plane in planes:
        facts = plane.facts
        assert plane.position_mm is not None
        middle = facts.row_step_mm * (facts.rows - 1) + facts.column_step_mm * (facts.columns - 1)
        heights.append(plane.position_mm[2] + float(middle[2]) / 2)
    return min(heights), max(heights)


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
