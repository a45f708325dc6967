"""File names: from where files lie, to the original ids of scans whose files carry none.

The rules are those of `ctfm.store.pseudonyms`: the shortest name that no other file has. Where a
catalogue is replaced, a file that was in it keeps its ids, also if files of its name have joined
it, or if its folder has moved: then its digest tells it, and some ending of its path is what its id
was made from. No other file gets these ids, also not one of its name when it is gone.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

from ctfm.extract.sources import Source, stem_of
from ctfm.store.catalogue import SCANS_SCHEMA, Catalogue
from ctfm.store.pseudonyms import Pseudonyms

_BIDS_SUBJECT = re.compile(r"(?:^|::|[/_])(sub-[A-Za-z0-9]+)")


@dataclass(frozen=True, kw_only=True)
class FileIds:
    """Original ids of a file."""

    name: str
    """Of scan and study: a file is its own study."""
    patient: str


@dataclass(frozen=True, kw_only=True)
class FormerIds:
    """The ids that files have in the catalogue that is replaced."""

    by_file: Mapping[str, str]
    """Scan ids of the scans that were one file each."""
    by_digest: Mapping[str, str]
    """Of those whose file is not where it was, and that no other was like."""
    patients: Mapping[str, str]
    """Patient ids by scan id."""
    scan_ids: Set[str]
    """All of them."""
    pseudonyms: Pseudonyms

    @classmethod
    def of(
        cls, before: Catalogue | None, key: bytes | None, *, found: Iterable[str]
    ) -> "FormerIds":
        """What a catalogue tells.

        Args:
            before: The catalogue; None is an empty one.
            key: Of the pseudonyms that are made now.
            found: Files that are there now.
        """
        if before is None:
            before = Catalogue(scans=SCANS_SCHEMA.empty_table(), files={}, key=key)
        single = {scan_id: own[0] for scan_id, own in before.files.items() if len(own) == 1}
        there, counts = set(found), Counter(before.digests.values())
        columns = before.scans.select(["scan_id", "patient_id"]).to_pydict().values()
        return cls(
            by_file={file: scan_id for scan_id, file in single.items()},
            by_digest={
                digest: scan_id
                for scan_id, digest in before.digests.items()
                if scan_id in single and single[scan_id] not in there and counts[digest] == 1
            },
            patients=dict(zip(*columns, strict=True)),
            scan_ids=before.files.keys(),
            pseudonyms=Pseudonyms(key),
        )

    def ids_of(self, source: Source, digest: str | None) -> FileIds | None:
        """What the ids of a file were made from; None if it had none, or they cannot be kept."""
        scan_id = self.by_file.get(source.file) or self.by_digest.get(digest or "")
        if scan_id is None:
            return None
        make = self.pseudonyms
        name = next((one for one in source.endings() if make.scan(one) == scan_id), None)
        if name is None:
            return None
        usual = _patient(source.relative(), name)
        possible = [usual, name, *_BIDS_SUBJECT.findall(source.file)]
        had = self.patients.get(scan_id, make.patient(usual))
        patient = next((one for one in possible if make.patient(one) == had), None)
        return None if patient is None else FileIds(name=name, patient=patient)

    def others(self, had: Iterable[FileIds | None]) -> Callable[[str], bool]:
        """Whether a name is that of a scan of before which none of these files is."""
        make = self.pseudonyms
        gone = self.scan_ids - {make.scan(ids.name) for ids in had if ids is not None}
        return lambda name: bool(gone) and make.scan(name) in gone


def file_ids(
    sources: Sequence[Source], *, digests: Sequence[str | None], former: FormerIds
) -> list[FileIds]:
    """Name every file.

    Args:
        sources: The files.
        digests: Of each, None if it could not be read.
        former: What they are called in the catalogue that is replaced.
    """
    copies = Counter(digests)
    had = [
        former.ids_of(source, digest if copies[digest] == 1 else None)
        for source, digest in zip(sources, digests, strict=True)
    ]
    kept = {ids.name for ids in had if ids is not None}
    gone = former.others(had)
    names = _shortest(sources, taken=lambda name: name in kept or gone(name))
    return [
        FileIds(name=name, patient=_patient(source.relative(), name)) if ids is None else ids
        for ids, name, source in zip(had, names, sources, strict=True)
    ]


def _shortest(sources: Sequence[Source], *, taken: Callable[[str], bool]) -> list[str]:
    """The shortest name of each file that no other has, and that is not taken."""
    deepest = max((source.file.count("/") for source in sources), default=0)
    longer: list[Callable[[Source], str]] = [
        Source.relative_stem,
        *(partial(Source.from_above_root, levels=levels) for levels in range(deepest + 1)),
    ]
    names = [stem_of(source.file).strip() for source in sources]
    for lengthen in longer:
        counts = Counter(names)
        crowded = {name for name, count in counts.items() if count > 1 or taken(name)}
        if not crowded:
            break
        names = [
            lengthen(source).strip() if name in crowded else name
            for name, source in zip(names, sources, strict=True)
        ]
    return names


def _patient(relative: str, name: str) -> str:
    """The nearest BIDS subject, or else the file itself."""
    subjects = _BIDS_SUBJECT.findall(relative)
    return subjects[-1] if subjects else name
