"""Labels: from a label table, to one row of 1, 0 or unknown for each id.

What a file may be is in `ctfm.store.label_files`, which column is what in
`ctfm.store.label_roles`, what a cell means in `ctfm.store.label_words`. The finest id column
joins; a `patient_id` beside a finer id says which scans are of one patient, where the catalogue
does not know (`ctfm.store.patients`). Unknown is NaN here; every loss and metric masks it. No
message repeats an id or a text of the table, which may name a patient: it says the row.

Everything that can be wrong with a table by itself is found here, all of it at once and before
anything is computed; it is joined to scans by `ctfm.store.label_join`.

Axes: n lines of the table, c findings.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from ctfm.store.errors import LabelError, some
from ctfm.store.label_columns import Column
from ctfm.store.label_files import TextTable, read_text_table
from ctfm.store.label_roles import ColumnUse, Roles, id_named, sort_columns
from ctfm.store.label_rules import LabelRules
from ctfm.store.label_words import is_missing
from ctfm.store.provenance import canonical_json
from ctfm.store.splits import split_named

_ROUNDED = re.compile(r"\d+(\.\d+)?e\+\d+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelTable:
    """A label table that was read; each id once."""

    source: str
    """File that it came from."""
    id_column: str
    """The kind of its ids, one of `ctfm.store.label_rules.ID_COLUMNS`."""
    ids: tuple[str, ...]
    rows: tuple[int, ...]
    """The first row of each id, from 1."""
    findings: tuple[str, ...]
    y: Float32[np.ndarray, "n c"]
    """1, 0, or NaN where unknown."""
    split: Shaped[np.ndarray, " n"] | None
    """train, validation, test or "" (in none of them); None without a `split` column."""
    patients: tuple[str, ...] | None = None
    """`patient_id` of each id, "" where it is empty; None without such a column beside the id's."""
    id_name: str = ""
    """The header of the id column."""
    id_repair: str | None = None
    """What is done to ids that match no scan as they are (`ctfm.store.id_repairs`)."""
    columns: tuple[ColumnUse, ...] = ()
    """What each column of the file was taken for."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the table says, whatever its format and the order of its lines."""
        order = np.argsort(np.array(self.ids, dtype=object), kind="stable")
        head = {
            "id_column": self.id_column,
            "ids": [self.ids[i] for i in order],
            "findings": self.findings,
            "split": None if self.split is None else self.split[order].tolist(),
        }
        if self.patients is not None:
            head["patients"] = [self.patients[i] for i in order]
        if self.id_repair is not None:
            head["id_repair"] = self.id_repair
        content = hashlib.sha256(canonical_json(head).encode())
        content.update(np.nan_to_num(self.y[order], nan=-1.0).astype(np.int8).tobytes())
        return content.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelReport:
    """A label table with all that is wrong with it."""

    source: str
    form: str
    """What the file is, for people."""
    lines: int
    """Rows below the header, without blank ones."""
    notes: tuple[str, ...]
    """What was passed over."""
    columns: tuple[ColumnUse, ...]
    problems: tuple[str, ...]
    """Each to be mended before the table can be used."""
    table: LabelTable | None
    """Without what is a problem; None if no column joins or none is a finding."""


def read_labels(
    path: Path | str, *, findings: Sequence[str] | None = None, rules: LabelRules | None = None
) -> LabelTable:
    """Read and check a label table.

    Args:
        path: CSV, an Excel workbook or Parquet.
        findings: Columns that are findings, in this order; None is what the rules say.
        rules: How it is to be read; None is what the TOML file beside it says, if there is one.

    Raises:
        LabelError: With everything that is wrong with it: no id column or no finding, a finding
            asked for that it lacks, cells of a finding that are no label, an unknown split, lines
            without id, or lines of one id that contradict each other or name two patients.
    """
    rules = LabelRules.beside(path) if rules is None else rules
    if findings is not None:
        rules = replace(rules, findings=tuple(findings))
    report = inspect_labels(path, rules)
    if report.problems:
        raise LabelError(all_problems(report.source, report.problems))
    assert report.table is not None
    return report.table


def inspect_labels(path: Path | str, rules: LabelRules) -> LabelReport:
    """Read a label table and collect what is wrong with it.

    Args:
        path: CSV, an Excel workbook or Parquet.
        rules: How it is to be read.

    Raises:
        LabelError: If the file cannot be read as a table.
    """
    path = Path(path)
    text = read_text_table(
        path, sheet=rules.sheet, is_id=lambda cell: _is_id(cell, asked=rules.id_column)
    )
    roles = sort_columns(text, rules)
    problems = list(roles.problems)
    table = _Reading(text, roles, problems).table(rules)
    return LabelReport(
        source=str(path),
        form=text.form,
        lines=len(text.rows),
        notes=text.notes,
        columns=roles.uses,
        problems=tuple(problems),
        table=table,
    )


def all_problems(source: str, problems: Sequence[str]) -> str:
    """One message for all that is wrong with a table."""
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return "\n  - ".join([f"{source}: {len(problems)} things to mend", *problems])


def _is_id(cell: str, *, asked: str | None) -> bool:
    """Whether a cell of a header names an id column, or the one that was asked for."""
    name = cell.strip()
    return id_named(name) is not None or (bool(name) and asked in (name, f"{name}={_kind(asked)}"))


def _kind(asked: str | None) -> str:
    return (asked or "").rpartition("=")[2]


class _Reading:
    """Columns to labels; faults are added to a list, and what is at fault is left out."""

    def __init__(self, text: TextTable, roles: Roles, problems: list[str]) -> None:
        self.text, self.roles, self.problems = text, roles, problems

    def table(self, rules: LabelRules) -> LabelTable | None:
        """The table, None without an id or a finding."""
        roles = self.roles
        if roles.id is None or roles.id_kind is None or not roles.findings:
            return None
        typed = roles.id.texts
        kept = self._with_id(typed, name=roles.id.name)
        if not kept.any():
            return None
        y = np.stack([one.y for one in roles.findings], axis=1)[kept]
        split = None if roles.split is None else _splits(roles.split)[kept]
        ids = [typed[line] for line in np.flatnonzero(kept)]
        rows: list[int] = self.text.rows[kept].tolist()
        merged = merge_lines(ids, y, split)
        if merged.contradicted:
            self.problems.append(_contradiction(roles.id.name, merged, rows))
        row_of = first_rows(ids, rows)
        return LabelTable(
            source=self.text.source,
            id_column=roles.id_kind,
            ids=tuple(merged.ids),
            rows=tuple(row_of[one] for one in merged.ids),
            findings=tuple(one.column.name for one in roles.findings),
            y=merged.y,
            split=merged.split,
            patients=self._patients(ids, kept, rows),
            id_name=roles.id.name,
            id_repair=rules.id_repair,
            columns=roles.uses,
        )

    def _with_id(self, typed: Sequence[str], *, name: str) -> Bool[np.ndarray, " n"]:
        """Which lines have an id."""
        kept = np.array([not is_missing(one) for one in typed], dtype=bool)
        without = self.text.rows[~kept].tolist()
        if without:
            row = f"row{'s' * (len(without) > 1)} {some(without)}"
            have = "have" if len(without) > 1 else "has"
            self.problems.append(f"{row} {have} no {name}: fill or remove (merged cells?)")
        rounded = [i for i, one in enumerate(typed) if _ROUNDED.fullmatch(one)]
        if rounded:
            self.problems.append(
                f"{name} in row {self.text.rows[rounded[0]]} (and {len(rounded) - 1} more) is a "
                "rounded decimal number, which ids lose digits in: format the column as text "
                "before it is filled"
            )
        return kept

    def _patients(
        self, ids: Sequence[str], kept: Bool[np.ndarray, " n"], rows: Sequence[int]
    ) -> tuple[str, ...] | None:
        """The patient of each distinct id, from a column that is not the id's own."""
        if self.roles.patients is None:
            return None
        texts = self.roles.patients.texts
        said = ["" if is_missing(texts[line]) else texts[line] for line in np.flatnonzero(kept)]
        patients: dict[str, str] = {}
        for row, one, patient in zip(rows, ids, said, strict=True):
            if patient and patients.get(one) not in (None, "", patient):
                self.problems.append(
                    f"the id of row {row} has another patient_id in an earlier row: a scan or "
                    "study is of one patient"
                )
                break
            patients[one] = patient or patients.get(one, "")
        return tuple(patients.get(one, "") for one in dict.fromkeys(ids))


def _splits(column: Column) -> Shaped[np.ndarray, " n"]:
    """The split of each line; "" also where a word names none."""
    names = ["" if is_missing(one) else split_named(one) or "" for one in column.values]
    return np.asarray(np.array(names, dtype="<U10")[column.codes])


def first_rows(ids: Sequence[str], rows: Sequence[int]) -> dict[str, int]:
    """The first row of each id."""
    return dict(zip(reversed(ids), reversed(rows), strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedLines:
    """Each id once."""

    ids: list[str]
    y: Float32[np.ndarray, "m c"]
    """0 where lines of one id contradict each other."""
    split: Shaped[np.ndarray, " m"] | None
    contradicted: int
    """Ids whose lines contradict each other."""
    example: Int64[np.ndarray, " _"]
    """Places of the lines of one of them."""


def merge_lines(
    ids: list[str], y: Float32[np.ndarray, "n c"], split: Shaped[np.ndarray, " n"] | None
) -> MergedLines:
    """Each id once; lines of one id complete each other."""
    place = {one: i for i, one in enumerate(dict.fromkeys(ids))}
    if len(place) == len(ids):
        return MergedLines(
            ids=ids, y=y, split=split, contradicted=0, example=np.array([], np.int64)
        )
    to = np.array([place[one] for one in ids])
    low = np.full((len(place), y.shape[1]), np.nan, dtype=np.float32)
    high = low.copy()
    np.fmin.at(low, to, y)
    np.fmax.at(high, to, y)
    contradicted = np.asarray((low < high).any(axis=1))
    merged_split = None
    if split is not None:
        merged_split = np.full(len(place), "", dtype=split.dtype)
        named = split != ""
        merged_split[to[named]] = split[named]
        contradicted[to[named & (merged_split[to] != split)]] = True
    return MergedLines(
        ids=list(place),
        y=low,
        split=merged_split,
        contradicted=int(contradicted.sum()),
        example=np.flatnonzero(to == int(np.argmax(contradicted))),
    )


def merged_lines(
    ids: list[str],
    y: Float32[np.ndarray, "n c"],
    split: Shaped[np.ndarray, " n"] | None,
    *,
    what: str,
    rows: Sequence[int],
) -> MergedLines:
    """Each id once.

    Raises:
        LabelError: If lines of one id contradict each other.
    """
    merged = merge_lines(ids, y, split)
    if merged.contradicted:
        raise LabelError(_contradiction(what, merged, rows))
    return merged


def _contradiction(what: str, merged: MergedLines, rows: Sequence[int]) -> str:
    first = [rows[line] for line in merged.example]
    return (
        f"{what} is the same in rows {some(first)}, which contradict each other "
        f"({merged.contradicted} such ids): keep one row, or make them agree (of a table by slice, "
        "take the largest label of each study)"
    )
