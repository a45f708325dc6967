"""File names: from where files lie, to the original ids of scans whose files carry none.

The rules are those of `ctfm.store.pseudonyms`: the shortest name that no other file has; study and
patient as something tells them, else by the name of the first file of the group. Where a
catalogue is replaced, a file that was in it keeps its ids, also if files of its name have joined
it, or if its folder has moved: then its digest tells it, and some ending of its path is what its id
was made from. No other file gets these ids, also not one of its name when it is gone.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeVar

from ctfm.extract.bids import possible_patients
from ctfm.extract.converted_names import relatives
from ctfm.extract.sources import Source, folder_of, stem_of
from ctfm.store.catalogue import SCANS_SCHEMA, Catalogue
from ctfm.store.pseudonyms import Pseudonyms

T = TypeVar("T")

MOST_COMPARED = 64
"""Files of one patient that are looked at where the ids of one were made from the name of another.

Chosen: dcm2niix writes fewer files of a study, and the time grows with the square of it.
"""


@dataclass(frozen=True, kw_only=True)
class FileIds:
    """Original ids of a file."""

    name: str
    study: str
    patient: str


@dataclass(frozen=True, kw_only=True)
class NamedFile:
    """A file that is to be named, and what else tells whose it is."""

    source: Source
    digest: str | None = None
    """None if it could not be read."""
    study: str = ""
    """StudyInstanceUID, if anything tells it."""
    patient: str = ""
    """PatientID or subject, if anything tells it."""
    said: tuple[str, ...] = ()
    """Ids that its sidecar holds, by which it may have been called."""

    @property
    def order(self) -> tuple[int, str]:
        """The first of a group is the one that it is called by."""
        return len(stem_of(self.source.file)), self.source.file

    def possible(self) -> Iterator[str]:
        """Whatever its study or patient may be called, the likely first."""
        yield from (self.patient, self.study, *self.said, *self.source.endings())
        for folder, stem in _relatives(self.source.file):
            yield from Source(f"{folder}{stem}.nii", self.source.root).endings()
        yield from possible_patients(self.source)


@dataclass(frozen=True, kw_only=True)
class FormerIds:
    """The ids that files have in the catalogue that is replaced."""

    by_file: Mapping[str, str]
    """Scan ids of the scans that were one file each."""
    by_relative: Mapping[tuple[str, str], Sequence[str]]
    """Their files by folder and each of `converted_names.relatives`."""
    by_digest: Mapping[str, str]
    """Scan ids of those whose file is not where it was, and that no other was like."""
    studies: Mapping[str, str]
    """Study ids by scan id."""
    patients: Mapping[str, str]
    """Patient ids by scan id."""
    scan_ids: Set[str]
    """All of them."""
    used: Set[str]
    """Those of usable scans."""
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
        scan_ids, studies, patients = (
            before.scans[name].to_pylist() for name in ("scan_id", "study_id", "patient_id")
        )
        by_relative: dict[tuple[str, str], list[str]] = defaultdict(list)
        for file in single.values():
            for relative in _relatives(file):
                by_relative[relative].append(file)
        return cls(
            by_relative=by_relative,
            by_file={file: scan_id for scan_id, file in single.items()},
            by_digest={
                digest: scan_id
                for scan_id, digest in before.digests.items()
                if scan_id in single and single[scan_id] not in there and counts[digest] == 1
            },
            studies=dict(zip(scan_ids, studies, strict=True)),
            patients=dict(zip(scan_ids, patients, strict=True)),
            scan_ids=before.files.keys(),
            used=set(before.scans.filter(before.scans["usable"])["scan_id"].to_pylist()),
            pseudonyms=Pseudonyms(key),
        )

    def ids_of(self, file: NamedFile, *, others: Iterable[NamedFile]) -> FileIds | None:
        """What the ids of a file were made from; None if it had none, or they cannot be kept.

        Args:
            file: With its digest only if no other file has the same.
            others: Some that it may be called by.
        """
        scan_id = self.by_file.get(file.source.file) or self.by_digest.get(file.digest or "")
        if scan_id is None:
            return None
        make = self.pseudonyms
        name = next((one for one in file.source.endings() if make.scan(one) == scan_id), None)
        if name is None:
            return None

        def original(of: Callable[[str], str], had: str | None) -> str | None:
            possible = chain(
                (name,),
                file.possible(),
                chain.from_iterable(gone.endings() for gone in self._relatives_of(file)),
                chain.from_iterable(one.possible() for one in others),
            )
            return next((one for one in possible if of(one) == had), None)

        study = original(make.study, self.studies.get(scan_id, make.study(file.study or name)))
        usual = make.patient(file.patient or file.study or name)
        patient = original(make.patient, self.patients.get(scan_id, usual))
        if study is None or patient is None:
            return None
        return FileIds(name=name, study=study, patient=patient)

    def was_used(self, ids: FileIds) -> bool:
        """Whether the scan of these ids was usable."""
        return bool(self.used) and self.pseudonyms.scan(ids.name) in self.used

    def _relatives_of(self, file: NamedFile) -> Iterator[Source]:
        for relative in _relatives(file.source.file):
            for one in self.by_relative.get(relative, ()):
                yield Source(one, file.source.root)

    def others(self, had: Iterable[FileIds | None]) -> Callable[[str], bool]:
        """Whether a name is that of a scan of before which none of these files is."""
        make = self.pseudonyms
        gone = self.scan_ids - {make.scan(ids.name) for ids in had if ids is not None}
        return lambda name: bool(gone) and make.scan(name) in gone


def file_ids(
    files: Sequence[NamedFile],
    *,
    studies: Sequence[int],
    patients: Sequence[int],
    former: FormerIds,
) -> list[FileIds]:
    """Name every file, its study and its patient.

    Args:
        files: The files.
        studies: The same number for files of one study.
        patients: The same number for files of one patient.
        former: What they are called in the catalogue that is replaced.
    """
    digests = Counter(file.digest for file in files)
    of_patient = _by_number(files, patients)
    had = [
        former.ids_of(
            file if digests[file.digest] == 1 else replace(file, digest=None),
            others=of_patient[number][:MOST_COMPARED],
        )
        for file, number in zip(files, patients, strict=True)
    ]
    kept = {ids.name for ids in had if ids is not None}
    gone = former.others(had)
    sources = [file.source for file in files]
    names = _shortest(sources, taken=lambda name: name in kept or gone(name))
    names = [name if ids is None else ids.name for ids, name in zip(had, names, strict=True)]
    called = list(zip(files, names, had, strict=True))
    study_of = {n: _study(group) for n, group in _by_number(called, studies).items()}
    patient_of = {n: _patient(group) for n, group in _by_number(called, patients).items()}
    return [
        FileIds(name=name, study=study_of[study], patient=patient_of[patient])
        if ids is None
        else ids
        for ids, name, study, patient in zip(had, names, studies, patients, strict=True)
    ]


_Called = tuple[NamedFile, str, FileIds | None]


def _study(group: Sequence[_Called]) -> str:
    kept = [ids.study for _, _, ids in group if ids is not None]
    told = [file.study for file, _, _ in group if file.study]
    return min(kept or told) if kept or told else _first_name(group)


def _patient(group: Sequence[_Called]) -> str:
    kept = [ids.patient for _, _, ids in group if ids is not None]
    told = [file.patient for file, _, _ in group if file.patient]
    study = [file.study for file, _, _ in group if file.study]
    return next((min(those) for those in (kept, told, study) if those), None) or _first_name(group)


def _first_name(group: Sequence[_Called]) -> str:
    return min((file.order, name) for file, name, _ in group)[1]


def _relatives(file: str) -> list[tuple[str, str]]:
    return [(folder_of(file), stem) for stem in relatives(stem_of(file))]


def _by_number(things: Sequence[T], numbers: Sequence[int]) -> dict[int, list[T]]:
    groups: dict[int, list[T]] = defaultdict(list)
    for thing, number in zip(things, numbers, strict=True):
        groups[number].append(thing)
    return groups


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
