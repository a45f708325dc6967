"""Index: from folders, files and archives, to the catalogue of their scans.

Headers only. Every file found is accounted for: it belongs to one line of the catalogue, with a
reason if that is of no use, or it is counted as ignored (text, tables, hidden files, files that
are not DICOM and do not claim to be, a DICOMDIR). Lines and their order do not depend on the
number of workers or the order of the file system.

DICOM series become lines in `series_scans`, files of other formats in `file_scans`. What cannot be
read is one line a file. Names of files become ids by the rules of `ctfm.store.pseudonyms`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ctfm.extract.choice import Candidate, by_study, choose
from ctfm.extract.file_names import FormerIds
from ctfm.extract.file_scans import Around, file_scans
from ctfm.extract.headers import Ignored, ImageFile, look_at_all
from ctfm.extract.series_ids import SeriesPlanes
from ctfm.extract.series_scans import series_scans
from ctfm.extract.sources import Broken, find
from ctfm.store.catalogue import SCANS_SCHEMA, Catalogue
from ctfm.store.pseudonyms import Pseudonyms
from ctfm.store.reasons import Reason


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
    series = SeriesPlanes()
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
    of_series = list(series_scans(series))
    around = Around(
        former=former,
        series=of_series,
        descriptions=found.descriptions,
    )
    scans = _numbered([*of_series, *file_scans(images, broken, around)])
    chosen = [scan for study in by_study(scans) for scan in choose(study)]
    return _catalogue(chosen, key, dict(sorted(found.ignored.items())))


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
