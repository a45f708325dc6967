"""Index: from folders, files and archives, to the catalogue of their scans.

Headers only. Every file found is accounted for: it belongs to one line of the catalogue, with a
reason if that is of no use, or it is counted as ignored (text, tables, hidden files, files that
are not DICOM and do not claim to be, a DICOMDIR). Lines and their order do not depend on the
number of workers or the order of the file system.

A DICOM series is one line; more if it holds several scans (`choice.split_planes`) or the same
images twice. A NIfTI, NRRD or MetaImage file is one line and a study of its own. What cannot be
read is one line a file. Names of files become ids by the rules of `ctfm.store.pseudonyms`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ctfm.extract.choice import Candidate, by_study, choose, fault_of, kernel_name, split_planes
from ctfm.extract.dicom import Plane, SeriesFacts
from ctfm.extract.file_names import FormerIds, file_ids
from ctfm.extract.geometry import Stack, check_head_stack, measure_stack
from ctfm.extract.headers import Ignored, ImageFile, look_at_all, stack_columns
from ctfm.extract.identity import planes_digest
from ctfm.extract.sources import Broken, Source, find, format_of
from ctfm.store.catalogue import SCANS_SCHEMA, Catalogue
from ctfm.store.errors import ScanError
from ctfm.store.pseudonyms import Pseudonyms
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


def index(
    paths: Sequence[Path],
    *,
    key: bytes | None,
    before: Catalogue | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Catalogue:
    """Find the scans under some paths, and choose one of each study.

    Args:
        paths: Folders, zip archives and files.
        key: Of the pseudonyms; None keeps the original ids.
        before: The catalogue that is replaced, if there is one. A NIfTI, NRRD or MetaImage file
            that is in it keeps its ids, whatever files of its name have joined it, and where its
            folder has moved.
        workers: Processes that read headers; 1 reads in this one. With more, a script needs the
            `if __name__ == "__main__":` guard.
        progress: Called with how many files are done, and of how many.

    Raises:
        ConfigError: If a path does not exist.
    """
    found = find(paths)
    series = _SeriesPlanes()
    images: list[ImageFile] = []
    broken = list(found.broken)
    for look in look_at_all(found.sources, workers=workers, progress=progress):
        if isinstance(look, Ignored):
            found.ignored[look.kind] += 1
        elif isinstance(look, ImageFile):
            images.append(look)
        elif isinstance(look, Broken):
            broken.append(look)
        else:
            series.add(look)
    former = FormerIds.of(before, key, found=[source.file for source in found.sources])
    files = list(_file_scans(images, broken, former))
    scans = _numbered([*_series_scans(series), *files])
    of_series, files = scans[: len(scans) - len(files)], scans[len(scans) - len(files) :]
    chosen = [scan for study in by_study(of_series) for scan in choose(study)]
    return _catalogue([*chosen, *files], key, dict(sorted(found.ignored.items())))


class _SeriesPlanes:
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


def _series_scans(series: _SeriesPlanes) -> Iterator[Candidate]:
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
        "vendor": _vendor(facts.vendor),
        "kernel": kernel_name(facts.kernel),
        "kvp": _median(plane.kvp for plane in planes),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _vendor(manufacturer: str) -> str | None:
    """A name from a closed list: the field is free text, and the catalogue may be shared."""
    if not manufacturer:
        return None
    return next(
        (v for v, words in _VENDORS.items() if re.search(words, manufacturer, re.I)), "other"
    )


def _file_scans(
    images: Iterable[ImageFile], broken: Iterable[Broken], former: FormerIds
) -> Iterator[Candidate]:
    """Files that are no DICOM series, under ids from their names."""
    entries = [*(_image_entry(image) for image in images), *map(_broken_entry, broken)]
    entries.sort(key=lambda entry: entry[0].file)
    named = file_ids(
        [source for source, _ in entries],
        digests=[scan.digest for _, scan in entries],
        former=former,
    )
    for ids, (_, scan) in zip(named, entries, strict=True):
        yield replace(scan, patient=ids.patient, study=ids.name, scan=ids.name)


def _image_entry(image: ImageFile) -> tuple[Source, Candidate]:
    scan = Candidate(
        patient="",
        study="",
        scan="",
        files=(image.source.file,),
        format=format_of(image.source.file),
        reason=image.reason,
        detail=image.detail,
        columns=image.columns,
        digest=image.digest,
    )
    return image.source, scan


def _broken_entry(broken: Broken) -> tuple[Source, Candidate]:
    first = broken.sources[0]
    # Several files in one line are members of one archive, which names them.
    named_by = first if len(broken.sources) == 1 else Source(first.archive, first.root)
    scan = Candidate(
        patient="",
        study="",
        scan="",
        files=tuple(source.file for source in broken.sources),
        format=format_of(first.file),
        reason=broken.reason,
        detail=broken.detail,
        columns={},
    )
    return named_by, scan


def _numbered(scans: Iterable[Candidate]) -> list[Candidate]:
    """Add `#2`, `#3` … where an original id repeats."""
    used: Counter[str] = Counter()
    numbered = []
    for scan in scans:
        name = scan.scan.strip()  # as `ctfm.store.pseudonyms` takes it
        used[name] += 1
        n = used[name]
        numbered.append(scan if n == 1 else replace(scan, scan=f"{name}#{n}"))
    return numbered


def _catalogue(scans: Iterable[Candidate], key: bytes | None, ignored: dict[str, int]) -> Catalogue:
    pseudonyms = Pseudonyms(key)
    files: dict[str, list[str]] = {}
    digests: dict[str, str] = {}
    lines: list[dict[str, Any]] = []
    alone: set[str] = set()
    for scan in scans:
        if scan.reason is Reason.OK and scan.patient == scan.study:
            alone.add(scan.study)
        line = {
            "scan_id": pseudonyms.scan(scan.scan),
            "study_id": pseudonyms.study(scan.study),
            "patient_id": pseudonyms.patient(scan.patient),
            "usable": scan.reason is Reason.OK,
            "reason": scan.reason.value,
            "detail": scan.detail,
            "format": scan.format,
            **scan.columns,
        }
        files[line["scan_id"]] = list(scan.files)
        if scan.digest is not None:
            digests[line["scan_id"]] = scan.digest
        lines.append(line)
    lines.sort(key=lambda line: (line["patient_id"], line["study_id"], line["scan_id"]))
    table = pa.Table.from_pylist(lines, schema=SCANS_SCHEMA)
    return Catalogue(
        scans=table,
        files={line["scan_id"]: files[line["scan_id"]] for line in lines},
        key=key,
        digests=digests,
        ignored=ignored,
        studies_without_patient=len(alone),
    )
