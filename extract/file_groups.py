"""File groups: from NIfTI and other single files, to which of them are of one study or patient.

Two files of one study that are taken for two patients leak from training into test; two patients
taken for one only make splits coarser, but two studies taken for one lose a scan. So files are of
one study only where something says so, and of one patient where it may well be.

One study: a plain file and its copies (`converted_names`); the same StudyInstanceUID, if one
patient has it (`file_owners`); the same image; names that differ in the letter or number that
dcm2niix gave, if the name before it ends in a time (the protocol before the time may differ, too),
or both files say the same time of acquisition on the same scanner. Of a thousand patients with
numbers for names, some were scanned at the same second of some day: for numbers the time needs its
date, or each number has to be the SeriesNumber.
One patient: these, the same subject or PatientID, and names that differ in the letter, unless both
say another patient.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ctfm.extract.converted_names import (
    TIME_DIGITS,
    beginning_of,
    copy_of,
    lettered_stem,
    names_a_time,
    number_of,
    numbered_stem,
)
from ctfm.extract.file_owners import Owner
from ctfm.extract.sidecars import NO_SIDECAR, Sidecar
from ctfm.extract.sources import Source, base_name, folder_of, format_of, stem_of

MAX_PATIENTS_OF_AN_IMAGE = 2
"""Chosen. An image of more is nobody's, such as a placeholder for a conversion that failed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedFile:
    """A file, and what tells whose it is."""

    source: Source
    subject: str = ""
    """BIDS subject, by its name."""
    owner: Owner = field(default_factory=Owner)
    sidecar: Sidecar = NO_SIDECAR
    digest: str | None = None
    """None if it could not be read."""
    content: str | None = None
    """As `ImageFile.content`."""

    @cached_property
    def place(self) -> tuple[str, str]:
        """Folder and stem."""
        return folder_of(self.source.file), stem_of(self.source.file)

    @cached_property
    def is_nifti(self) -> bool:
        """As dcm2niix writes."""
        return format_of(self.source.file) == "nifti"

    @cached_property
    def series(self) -> tuple[str, str]:
        """Folder, and stem of the plain file of its series."""
        folder, stem = self.place
        return folder, copy_of(stem)[0] if self.is_nifti else base_name(self.source.file)


def same_images(files: Sequence[GroupedFile]) -> list[list[int]]:
    """Which files hold one image, if several do: equal, packed otherwise, or packed and not."""
    links = _Links(len(files))
    links.join_equal([i for i, file in enumerate(files) if file.digest], lambda i: files[i].digest)
    links.join_equal(
        [i for i, file in enumerate(files) if file.content], lambda i: files[i].content
    )
    return [group for group in links.groups() if len(group) > 1]


def studies_and_patients(files: Sequence[GroupedFile]) -> tuple[list[int], list[int]]:
    """Number files so that those of one study, and those of one patient, have one number."""
    studies, patients = _Links(len(files)), _Links(len(files))
    every = range(len(files))
    studies.join_equal(every, lambda i: files[i].series)
    studies.join_equal([i for i in every if files[i].owner.study], lambda i: files[i].owner.study)
    for group in same_images(files):
        if len({files[i].owner.patient for i in group} - {""}) <= MAX_PATIENTS_OF_AN_IMAGE:
            told = {files[i].owner.study for i in group} - {""}
            (studies if len(told) < 2 else patients).join(group)
    for one, other, sure in _siblings(files):
        (studies if sure else patients).join((one, other))
    named = [i for i in every if files[i].owner.patient]
    patients.join_equal(named, lambda i: files[i].owner.patient)
    patients.join_equal([i for i in every if files[i].subject], lambda i: files[i].subject)
    patients.join_equal(every, studies.number)
    return [studies.number(i) for i in every], [patients.number(i) for i in every]


def _siblings(files: Sequence[GroupedFile]) -> Iterable[tuple[int, int, bool]]:
    """Pairs whose names differ in a letter or number; and whether they are of one study."""
    series: dict[tuple[str, str], int] = {}
    for i, file in enumerate(files):
        if file.is_nifti and (i == series.setdefault(file.series, i) or file.sidecar.acquired):
            series[file.series] = i
    first: dict[Hashable, int] = {}
    for (folder, stem), i in series.items():
        gave_way_to = series.get((folder, lettered_stem(stem) or ""))
        if gave_way_to is not None and _may_be_one_patient(files[i], files[gave_way_to]):
            yield gave_way_to, i, _one_study(files[i], files[gave_way_to], lettered_stem(stem))
        base = numbered_stem(stem)
        time = _time_of(files[i].sidecar, base, stem) if base else ""
        if base and time:
            other = first.setdefault((folder, beginning_of(base), time), i)
            if _one_study(files[i], files[other], base):
                yield other, i, True


def _time_of(said: Sidecar, base: str, stem: str) -> str:
    """What may tell the study of a name with a number; "" for nothing."""
    if names_a_time(base):
        return base[-TIME_DIGITS:]
    is_of_series = number_of(stem) == str(said.series_number)
    return said.acquired if said.dated or is_of_series else ""


def _may_be_one_patient(one: GroupedFile, other: GroupedFile) -> bool:
    told = {one.owner.patient, other.owner.patient} - {""}
    return len(told) < 2 and (len(told) == 1 or not _differ(one.owner.study, other.owner.study))


def _one_study(one: GroupedFile, other: GroupedFile, base: str | None) -> bool:
    mine, others = one.sidecar, other.sidecar
    if _differ(one.owner.study, other.owner.study) or not _may_be_one_patient(one, other):
        return False
    if mine.acquired and others.acquired:
        return mine.acquired == others.acquired or names_a_time(base or "")
    return names_a_time(base or "")


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


class _Links:
    """Things that are joined, directly or through others."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def number(self, i: int) -> int:
        """The lowest of those that `i` is joined with."""
        while self._above[i] != i:
            self._above[i] = self._above[self._above[i]]
            i = self._above[i]
        return i

    def join(self, those: Iterable[int]) -> None:
        """Make them one group."""
        numbers = [self.number(i) for i in those]
        for number in numbers:
            one, other = sorted((self.number(number), self.number(numbers[0])))
            self._above[other] = one

    def join_equal(self, those: Iterable[int], key: Callable[[int], Hashable]) -> None:
        """Make one group of those with one key."""
        first: dict[Hashable, int] = {}
        for i in those:
            self.join((first.setdefault(key(i), i), i))

    def groups(self) -> list[list[int]]:
        """All groups, each in order."""
        groups: dict[int, list[int]] = defaultdict(list)
        for i in range(len(self._above)):
            groups[self.number(i)].append(i)
        return list(groups.values())
