"""File scans: from NIfTI, NRRD and MetaImage files, and broken ones, to lines of the catalogue.

Each is one line, under ids from its name (`file_names`) and from what the JSON file beside it says;
files of one study or patient are found by `file_groups`. A file is refused by the first of these
that holds: what its sidecar says of its kind; its BIDS name; another file of its series that
dcm2niix made right; its geometry; the same image under another name, or as DICOM.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from ctfm.extract.bids import described_folders, name_fault, patients
from ctfm.extract.choice import Candidate
from ctfm.extract.converted_names import copy_fault, copy_of
from ctfm.extract.file_groups import GroupedFile, same_images, studies_and_patients
from ctfm.extract.file_names import FileIds, FormerIds, NamedFile, file_ids
from ctfm.extract.headers import ImageFile
from ctfm.extract.kernels import kernel_name
from ctfm.extract.sidecars import Sidecar
from ctfm.extract.sources import Broken, Source, format_of
from ctfm.extract.vendors import vendor_name
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_COULD_NOT_BE_READ = (Reason.UNREADABLE, Reason.UNSUPPORTED_ENCODING)


@dataclass(frozen=True, kw_only=True)
class Around:
    """What else was found, by which files are judged."""

    former: FormerIds
    series: Mapping[str, Reason]
    """By SeriesInstanceUID, the reason of each DICOM series."""
    descriptions: Sequence[str] = ()
    """`dataset_description.json` of BIDS."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Entry:
    file: GroupedFile
    scan: Candidate
    named: bool = False
    """Whether its name alone is why it is refused, which says nothing of its copies."""


def file_scans(
    images: Iterable[ImageFile], broken: Iterable[Broken], around: Around
) -> Iterator[Candidate]:
    """Files that are no DICOM series, under ids from their names and sidecars."""
    entries = [*map(_image_entry, images), *map(_broken_entry, broken)]
    entries.sort(key=lambda entry: entry.file.source.file)
    subjects = patients(
        [entry.file.source for entry in entries], described_folders(around.descriptions)
    )
    entries = [
        replace(
            entry,
            file=replace(entry.file, patient=subject or entry.file.sidecar.patient),
        )
        for entry, subject in zip(entries, subjects, strict=True)
    ]
    entries = _judged(entries, around.series)
    ids = _ids(entries, around.former)
    for own, entry in zip(ids, _without_copies(entries, ids, around.former), strict=True):
        yield replace(entry.scan, patient=own.patient, study=own.study, scan=own.name)


def _ids(entries: Sequence[_Entry], former: FormerIds) -> list[FileIds]:
    of_study, of_patient = studies_and_patients([entry.file for entry in entries])
    named = [
        NamedFile(
            source=entry.file.source,
            digest=entry.file.digest,
            study=entry.file.sidecar.study,
            patient=entry.file.patient,
        )
        for entry in entries
    ]
    return file_ids(named, studies=of_study, patients=of_patient, former=former)


def _image_entry(image: ImageFile) -> _Entry:
    said = image.sidecar
    unread = "the JSON file beside it cannot be read" if said.damaged else ""
    scan = Candidate(
        patient="",
        study="",
        scan="",
        files=(image.source.file,),
        format=format_of(image.source.file),
        reason=image.reason,
        detail="; ".join(filter(None, (image.detail, unread))),
        columns={
            **image.columns,
            "thickness_mm": said.thickness_mm,
            "vendor": vendor_name(said.vendor),
            "kernel": kernel_name(said.kernel) if said.kernel else None,
            "kvp": said.kvp,
        },
        facts=said,
        digest=image.digest,
    )
    file = GroupedFile(
        source=image.source, sidecar=said, digest=image.digest, content=image.content
    )
    return _Entry(file=file, scan=scan)


def _broken_entry(broken: Broken) -> _Entry:
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
    return _Entry(file=GroupedFile(source=named_by), scan=scan)


def _judged(entries: Sequence[_Entry], series: Mapping[str, Reason]) -> list[_Entry]:
    stems = {entry.file.place[1] for entry in entries}
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        if entry.file.is_nifti:
            kinds[entry.file.series].add(copy_of(entry.file.place[1])[1])
    return [_judge(entry, stems, kinds[entry.file.series], series) for entry in entries]


def _judge(entry: _Entry, stems: Set[str], kinds: Set[str], series: Mapping[str, Reason]) -> _Entry:
    if entry.file.digest is None:
        return entry
    stem = entry.file.place[1]
    if (fault := entry.file.sidecar.fault()) is not None:
        return replace(entry, scan=_refused(entry.scan, fault))
    if (fault := name_fault(stem, stems)) is not None:
        return replace(entry, scan=_refused(entry.scan, fault), named=True)
    fault = copy_fault(copy_of(stem)[1], kinds) if entry.file.is_nifti else None
    fault = fault or _dicom_fault(entry.file.sidecar, series)
    if fault is not None and entry.scan.reason is Reason.OK:
        return replace(entry, scan=_refused(entry.scan, fault))
    return entry


def _dicom_fault(sidecar: Sidecar, series: Mapping[str, Reason]) -> ScanError | None:
    if series.get(sidecar.series, Reason.UNREADABLE) in _COULD_NOT_BE_READ:
        return None
    return ScanError(Reason.DUPLICATE_SCAN, "the DICOM series that it was made from is here, too")


def _refused(scan: Candidate, fault: ScanError) -> Candidate:
    return replace(scan, reason=fault.reason, detail=fault.detail)


def _without_copies(
    entries: Sequence[_Entry], ids: Sequence[FileIds], former: FormerIds
) -> list[_Entry]:
    """Refuse all files of one image but the first: one with a fault, else the one that was used."""

    def rank(i: int) -> tuple[int, bool, str]:
        entry = entries[i]
        kind = 2 if entry.named else int(entry.scan.reason is Reason.OK)
        return kind, not former.was_used(ids[i]), entry.file.source.file

    kept = list(entries)
    for group in same_images([entry.file for entry in entries]):
        for i in sorted(group, key=rank)[1:]:
            fault = ScanError(Reason.DUPLICATE_SCAN, "the same image has a line under another name")
            kept[i] = replace(entries[i], scan=_refused(entries[i].scan, fault))
    return kept
