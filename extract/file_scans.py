"""File scans: from NIfTI, NRRD and MetaImage files, and broken ones, to lines of the catalogue.

Each is one line, under ids from its name (`file_names`) and from what the JSON file beside it says;
files of one study or patient are found by `file_groups`. A file is refused by the first of these
that holds: what its sidecar says of its kind; its BIDS name; another file of its series that
dcm2niix made right; its geometry; the same image under another name, or as DICOM.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace

from ctfm.extract.bids import described_folders, name_fault, patients
from ctfm.extract.choice import Candidate
from ctfm.extract.converted_names import copy_fault, copy_of
from ctfm.extract.file_groups import GroupedFile, same_images, studies_and_patients
from ctfm.extract.file_names import FileIds, FormerIds, NamedFile, file_ids
from ctfm.extract.file_owners import owners
from ctfm.extract.headers import ImageFile
from ctfm.extract.kernels import kernel_name
from ctfm.extract.sources import Broken, Source, format_of
from ctfm.extract.vendors import vendor_name
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason

_ALIKE_IN_BOTH = frozenset(
    {
        Reason.OK,
        Reason.NOT_CT,
        Reason.COLOUR,
        Reason.LOCALIZER,
        Reason.DERIVED,
        Reason.CONTRAST,
        Reason.NOT_AXIAL,
        Reason.BAD_RESCALE,
    }
)
"""What holds of the images of a DICOM series however they are written. Others are of its files."""


@dataclass(frozen=True, kw_only=True)
class Around:
    """What else was found, by which files are judged."""

    former: FormerIds
    series: Sequence[Candidate] = ()
    """Scans of DICOM series, of each series the best first."""
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
    entries = _judged(_with_owners(entries, subjects, around.series), around.series)
    ids = _ids(entries, around.former)
    for own, entry in zip(ids, _without_copies(entries, ids, around.former), strict=True):
        yield replace(entry.scan, patient=own.patient, study=own.study, scan=own.name)


def _with_owners(
    entries: Sequence[_Entry], subjects: Sequence[str], series: Sequence[Candidate]
) -> list[_Entry]:
    dicom: dict[str, set[str]] = defaultdict(set)
    for scan in series:
        dicom[scan.study].add(scan.patient)
    whose = owners(subjects, [entry.file.sidecar for entry in entries], dicom)
    return [
        replace(entry, file=replace(entry.file, subject=subject, owner=owner))
        for entry, subject, owner in zip(entries, subjects, whose, strict=True)
    ]


def _ids(entries: Sequence[_Entry], former: FormerIds) -> list[FileIds]:
    of_study, of_patient = studies_and_patients([entry.file for entry in entries])
    named = [
        NamedFile(
            source=entry.file.source,
            digest=entry.file.digest,
            study=entry.file.owner.study,
            patient=entry.file.owner.patient,
            said=(entry.file.sidecar.patient, entry.file.sidecar.study),
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


def _judged(entries: Sequence[_Entry], series: Sequence[Candidate]) -> list[_Entry]:
    dicom = {scan.scan: scan for scan in reversed(series)}
    stems: dict[str, set[str]] = defaultdict(set)
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        file = entry.file
        stems[file.subject].add(file.place[1])
        if file.is_nifti:
            kinds[file.series].add(copy_of(file.place[1])[1])
    return [
        _judge(
            entry,
            stems=stems[entry.file.subject],
            kinds=kinds[entry.file.series],
            made_from=dicom.get(entry.file.sidecar.series),
        )
        for entry in entries
    ]


def _judge(
    entry: _Entry, *, stems: Set[str], kinds: Set[str], made_from: Candidate | None
) -> _Entry:
    """Refuse a file for what stands beside it.

    Args:
        entry: The file.
        stems: Of the files of its subject.
        kinds: Of the files of its series.
        made_from: The DICOM series that is said to be its origin.
    """
    if entry.file.digest is None:
        return entry
    stem = entry.file.place[1]
    if (fault := entry.file.sidecar.fault()) is not None:
        return replace(entry, scan=_refused(entry.scan, fault))
    if (fault := name_fault(stem, stems)) is not None:
        return replace(entry, scan=_refused(entry.scan, fault), named=True)
    kind = copy_of(stem)[1]
    fault = copy_fault(kind, kinds) if entry.file.is_nifti else None
    if fault is None and made_from is not None:
        fault = _dicom_fault(entry.scan, kind, made_from)
    if fault is not None and entry.scan.reason is Reason.OK:
        return replace(entry, scan=_refused(entry.scan, fault))
    return entry


def _dicom_fault(scan: Candidate, kind: str, made_from: Candidate) -> ScanError | None:
    """Why a file is not used beside the DICOM series that it was made from; None if it may be."""
    if made_from.reason in _ALIKE_IN_BOTH:
        detail = "the DICOM series that it was made from is here, too"
        return ScanError(Reason.DUPLICATE_SCAN, detail)
    # `_Eq` of dcm2niix has slices that were made up between those that are there.
    no_more = scan.columns["n_slices"] <= (made_from.columns.get("n_slices") or 0)
    if made_from.reason is Reason.MISSING_SLICES and (no_more or "_Eq" in kind):
        detail = "the DICOM series that it was made from is here, too, and lacks slices"
        return ScanError(Reason.MISSING_SLICES, detail)
    return None


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
