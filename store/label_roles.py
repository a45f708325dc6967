"""Label roles: from a table of text, to which column is the id, the split, a finding or neither.

Nothing is guessed: a column is a finding if every cell of it is a word or number that means
positive, negative or unknown (`ctfm.store.label_words`). A column that is so for the most part is a
finding with faults, and an error; it is not silently left out. What is left out has a reason.

    id        `scan_id`, `study_id`, `patient_id`, in any case, or their names in DICOM and BIDS
    split     `split`, or a column such as `set` that holds nothing but names of splits
    finding   every other column of labels, but those whose name says that they are none (sex, age,
              fold, site …); these, too, if they are asked for by name
    ignored   the rest
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from ctfm.store.errors import some
from ctfm.store.label_columns import LISTED, Column, Labels, kinds_of
from ctfm.store.label_files import TextTable
from ctfm.store.label_rules import ID_COLUMNS, LabelRules
from ctfm.store.label_words import Words, is_missing, plain
from ctfm.store.splits import split_named

Role = Literal["id", "patients", "split", "finding", "ignored"]

_ALIASES = {
    "scanid": "scan_id",
    "seriesid": "scan_id",
    "seriesuid": "scan_id",
    "seriesinstanceuid": "scan_id",
    "studyid": "study_id",
    "studyuid": "study_id",
    "studyinstanceuid": "study_id",
    "patientid": "patient_id",
    "subjectid": "patient_id",
    "participantid": "patient_id",
}
_SPLIT_NAMES = ("split", "datasplit", "set", "subset", "dataset", "partition")
_NO_FINDINGS = {
    name: why
    for names, why in (
        (
            "age sex gender male female patientage patientsex race ethnicity alter geschlecht "
            "weight height bmi",
            "a trait of the patient by its name",
        ),
        (
            "site centre center hospital institution scanner vendor manufacturer kernel kvp",
            "where the scan is from, by its name",
        ),
        (
            "id fold index idx row rownumber nr number year month date time",
            "a number of the row or a date, by its name",
        ),
        (
            "include included exclude excluded usable",
            "which rows to use, by its name: remove the other rows, or leave their split empty",
        ),
    )
    for name in names.split()
}
_UNNAMED = re.compile(r"(unnamed: ?\d+|column\d+|)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ColumnUse:
    """What a column is taken for, and why."""

    name: str
    role: Role
    why: str
    """No cell of it, but numbers below 1000 and words that mean labels."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What the columns of a table are."""

    uses: tuple[ColumnUse, ...]
    """One a column of the file, in its order."""
    problems: tuple[str, ...]
    id_kind: str | None
    """One of `ID_COLUMNS`; None if no column joins."""
    id: Column | None
    patients: Column | None
    split: Column | None
    findings: tuple[Labels, ...]


def id_named(name: str) -> str | None:
    """The id column that a header means (`Study_ID`, `StudyInstanceUID` …), None if none."""
    return _ALIASES.get(_letters(name))


def sort_columns(table: TextTable, rules: LabelRules) -> Roles:
    """Decide what each column is.

    Args:
        table: The file.
        rules: What the user says of it.

    Raises:
        ConfigError: If a word of the rules has two meanings.
    """
    return _Sorting(table, rules).roles()


class _Sorting:
    """One table while its columns are sorted; faults are collected, not raised."""

    def __init__(self, table: TextTable, rules: LabelRules) -> None:
        self.table, self.rules = table, rules
        self.columns = [
            Column(name, texts, kind=kind)
            for name, texts, kind in zip(table.names, table.columns, table.kinds, strict=True)
        ]
        self.words = Words.given(rules.positive, rules.negative, rules.uncertain)
        self.uses: dict[int, ColumnUse] = {}
        self.problems: list[str] = []

    def roles(self) -> Roles:
        """Sort them: ids, then the split, then findings; each column has one role."""
        for place in self._named(self.rules.ignore, rule="ignore"):
            self._use(place, "ignored", "asked for")
        joins, kind = self._id()
        patients = self._patients(kind)
        split = self._split()
        findings = self._findings()
        for name in sorted({name for name in self._names("finding")}):
            if self._names("finding").count(name) > 1:
                self.problems.append(
                    f"more than one column is named {name!r}: rename or remove one, or leave "
                    f"both out (--ignore {_typed(name)})"
                )
        if not findings and not self.problems:
            self.problems.append(self._no_finding())
        return Roles(
            uses=tuple(self.uses[i] for i in range(len(self.columns))),
            problems=tuple(self.problems),
            id_kind=kind,
            id=None if joins is None else self.columns[joins],
            patients=None if patients is None else self.columns[patients],
            split=None if split is None else self.columns[split],
            findings=tuple(findings),
        )

    def _use(self, place: int, role: Role, why: str) -> None:
        self.uses[place] = ColumnUse(name=self.columns[place].name, role=role, why=why)

    def _names(self, role: Role) -> list[str]:
        return [use.name for use in self.uses.values() if use.role == role]

    def _free(self) -> list[int]:
        return [i for i in range(len(self.columns)) if i not in self.uses]

    def _named(self, names: Iterable[str], *, rule: str) -> list[int]:
        """Places of columns that the user names, in that order."""
        present = [unicodedata.normalize("NFC", column.name) for column in self.columns]
        places: list[int] = []
        for name in dict.fromkeys(names):
            found = [i for i, one in enumerate(present) if one == _same(name)]
            if not found:
                self.problems.append(f"{self._unknown(name, present)} (--{rule})")
            places += found
        return places

    def _unknown(self, name: str, present: Sequence[str]) -> str:
        free = [one for one in present if one]
        near = [
            *(one for one in free if one.casefold() == _same(name).casefold()),
            *get_close_matches(name, free, n=3),
            *(one for one in free if "," in one and name in one.split(",")[0]),
        ]
        hint = (
            f"did you mean {', '.join(map(_typed, dict.fromkeys(near)))}?"
            if near
            else (f"it has {some(map(repr, free))}")
        )
        return f"no column is named {name!r}: {hint}"

    def _id(self) -> tuple[int | None, str | None]:
        """Place and kind of the id."""
        if self.rules.id_column is not None:
            return self._asked_id(self.rules.id_column)
        free = self._free()
        kinds = {i: id_named(self.columns[i].name) for i in free}
        for kind in ID_COLUMNS:
            places = [i for i in free if kinds[i] == kind]
            if len(places) > 1:
                names = " and ".join(repr(self.columns[i].name) for i in places)
                self.problems.append(
                    f"more than one column {kind!r}: {names}. Say which one joins with "
                    "--id-column, or leave one out with --ignore"
                )
            if places:
                return self._take_id(places[0], kind)
        self.problems.append(self._no_id())
        return None, None

    def _asked_id(self, asked: str) -> tuple[int | None, str | None]:
        name, kind = _name_and_kind(asked)
        places = self._named([name], rule="id-column")
        if not places:
            return None, None
        kind = kind or id_named(name)
        if kind is None:
            self._use(places[0], "id", "of what?")
            self.problems.append(
                f"column {name!r} is an id of what? Say --id-column {_typed(name)}=KIND, where "
                f"KIND is one of {', '.join(ID_COLUMNS)}"
            )
            return places[0], None
        return self._take_id(places[0], kind)

    def _take_id(self, place: int, kind: str) -> tuple[int, str]:
        column = self.columns[place]
        if column.kind:
            self.problems.append(
                f"column {column.name!r} holds {column.kind}, and an id is one number or text a row"
            )
        self._use(place, "id", kind)
        for other in self._free():
            coarser = id_named(self.columns[other].name)
            if coarser and (coarser != "patient_id" or kind == "patient_id"):
                self._use(other, "ignored", f"{column.name} joins")
        return place, kind

    def _no_id(self) -> str:
        names = [column.name for column in self.columns]
        has = some(map(repr, names))
        fact = f"no id column: it needs scan_id, study_id or patient_id, and has {has}"
        if any("accession" in name.lower() for name in names):
            return (
                f"{fact}. No catalogue holds accession numbers, which name a visit of a patient: "
                "add a column of the StudyInstanceUID, which the PACS lists beside them"
            )
        return f"{fact}. If one of them holds ids, say so with --id-column NAME=study_id"

    def _patients(self, kind: str | None) -> int | None:
        if kind == "patient_id":
            return None
        places = [i for i in self._free() if id_named(self.columns[i].name) == "patient_id"]
        for place in places:
            self._use(place, "patients", "which scans are of one patient")
        if len(places) > 1:
            self.problems.append("more than one column 'patient_id': leave one out with --ignore")
        if places and self.columns[places[0]].kind:
            column = self.columns[places[0]]
            self.problems.append(
                f"column {column.name!r} holds {column.kind}, and a patient_id is one number or "
                "text a row"
            )
        return places[0] if places else None

    def _split(self) -> int | None:
        free = [i for i in self._free() if _letters(self.columns[i].name) in _SPLIT_NAMES]
        asked = {_same(name) for name in self.rules.findings or ()}
        free = [i for i in free if _same(self.columns[i].name) not in asked]
        own = [i for i in free if _letters(self.columns[i].name) == "split"]
        places = own or [i for i in free if _is_split(self.columns[i])]
        if len(places) > 1:
            names = " and ".join(repr(self.columns[i].name) for i in places)
            self.problems.append(f"{names} could both be the split: leave one out with --ignore")
        for place in places:
            self._use(place, "split", "names of splits")
            self._check_split(self.columns[place])
        return places[0] if places else None

    def _check_split(self, column: Column) -> None:
        if column.kind:
            self.problems.append(
                f"column {column.name!r} holds {column.kind}, and a split is one word a row"
            )
        lines = column.lines(lambda value: not is_missing(value) and split_named(value) is None)
        if lines:
            self.problems.append(
                f"{column.name!r} is no name of a split in {self._rows(lines)}: it must be train, "
                "validation, test, or empty for a scan that is not used"
            )

    def _findings(self) -> list[Labels]:
        asked = self.rules.findings
        if asked is not None:
            places = self._named(asked, rule="findings")
            for name in (self.columns[i].name for i in places if i in self.uses):
                self.problems.append(f"column {name!r} is asked for, and is no finding")
            places = [i for i in places if i not in self.uses]
            found = [self._labels(i) for i in places]
            for labels, place in zip(found, places, strict=True):
                self._take(place, labels)
            for place in self._free():
                self._use(place, "ignored", "not among the findings asked for")
            self._check_minus_one(found)
            return found
        found = []
        for place in self._free():
            labels = self._labels(place)
            if why := self._why_not(self.columns[place], labels):
                self._use(place, "ignored", why)
            else:
                self._take(place, labels)
                found.append(labels)
        self._check_minus_one(found)
        return found

    def _labels(self, place: int) -> Labels:
        return Labels.of(self.columns[place], self.words)

    def _take(self, place: int, labels: Labels) -> None:
        """A column is a finding; what is no label in it is a fault."""
        column = labels.column
        self._use(place, "finding", labels.said())
        if column.kind:
            self.problems.append(
                f"column {column.name!r} holds {column.kind}, and a finding is one number or text "
                "a row"
            )
        elif labels.strays:
            lines = column.lines(lambda value: labels.meanings[value] is None)
            kinds = kinds_of(value for value, one in labels.meanings.items() if one is None)
            self.problems.append(
                f"column {column.name!r} holds {kinds} in {self._rows(lines)}: a finding is 1, 0, "
                "yes, no …, or empty where unknown. Mend these cells, say what they mean "
                "(--positive, --negative, --uncertain), or leave the column out (--ignore "
                f"{_typed(column.name)})"
            )

    def _why_not(self, column: Column, labels: Labels) -> str | None:
        """Why a column that nobody asked for is no finding; None if it is one."""
        if column.kind:
            return f"holds {column.kind}"
        if _UNNAMED.fullmatch(column.name):
            return "has no name"
        if "accession" in column.name.lower():
            return "accession numbers join nothing: no catalogue holds them"
        if labels.strays and not labels.mostly:
            kinds = kinds_of(value for value, one in labels.meanings.items() if one is None)
            beside = f" beside {labels.decided} labels" if labels.decided else ""
            return f"holds {kinds}{beside}"
        return _NO_FINDINGS.get(_letters(column.name))

    def _check_minus_one(self, found: Sequence[Labels]) -> None:
        """-1 beside 0 is CheXpert's; where no column has both, it may mean negative."""
        told = "-1" in map(plain, self.rules.uncertain)
        if told or "-1" not in self.words.unknown:
            return
        with_minus = [one for one in found if "-1" in map(plain, one.meanings)]
        if with_minus and not any(0.0 in one.meanings.values() for one in with_minus):
            names = some(repr(one.column.name) for one in with_minus)
            self.problems.append(
                f"-1 and no 0 is in {names}: say what -1 means, --uncertain=-1 or --negative=-1"
            )

    def _no_finding(self) -> str:
        ignored = [f"{use.name!r} {use.why}" for use in self.uses.values() if use.role == "ignored"]
        told = f" ({'; '.join(ignored[:LISTED])})" if ignored else ""
        return f"no finding: it needs a column of 1 and 0, or yes and no, for each{told}"

    def _rows(self, lines: Sequence[int]) -> str:
        rows = self.table.rows[list(lines)].tolist()
        return f"row{'s' * (len(rows) > 1)} {some(rows)}"


def _name_and_kind(asked: str) -> tuple[str, str | None]:
    name, equals, kind = asked.rpartition("=")
    if equals and id_named(kind):
        return name, id_named(kind)
    return asked, None


def _is_split(column: Column) -> bool:
    filled = [value for value in column.values if not is_missing(value)]
    return bool(filled) and all(split_named(value) for value in filled)


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _typed(name: str) -> str:
    """A name as it is typed where a, b, … are asked for."""
    return f"""'"{name}"'""" if "," in name else repr(name)
