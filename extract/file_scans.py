"""File scans: from NIfTI, NRRD and MetaImage files, and broken ones, to lines of the catalogue.

Each is one line and a study of its own, under ids from its name (`file_names`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ctfm.extract.choice import Candidate
from ctfm.extract.file_names import FormerIds, file_ids
from ctfm.extract.headers import ImageFile
from ctfm.extract.sources import Broken, Source, format_of


def file_scans(
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
