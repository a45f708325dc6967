"""Labels: from a wide table in CSV or Parquet, to one row of 1, 0 or unknown for each scan.

One id column (`scan_id`, `study_id` or `patient_id`, in any case or by its name in DICOM, such as
`StudyInstanceUID`; the finest one present joins), one column a finding with 1, 0 or nothing,
optionally `split`. A `patient_id` beside a finer id says which scans are of one patient, where the
catalogue does not know (`ctfm.store.patients`). Every other column is a finding, whether or not
the taxonomy has it, and must hold nothing but 1 and 0: for a table with further columns (age,
report text) the user names the findings. Unknown is NaN here; every loss and metric masks it. No
message repeats an id or a text of the table, which may name a patient: it says the row.

Everything that can be wrong with a table is found here, before anything is computed. No splits are
drawn here.

Axes: n lines of the table or of the scans, c findings.
"""

import csv
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Shaped

from ctfm.store.errors import LabelError, some
from ctfm.store.patients import patient_groups
from ctfm.store.provenance import canonical_json
from ctfm.store.pseudonyms import Pseudonyms
from ctfm.store.splits import SPLITS, split_named

ID_COLUMNS = ("scan_id", "study_id", "patient_id")
"""From fine to coarse."""

SPLIT_COLUMN = "split"

_UNKNOWN = ("", "na", "n/a", "nan", "null", "none", "<na>")
_WORDS = {"true": 1.0, "false": 0.0}
_ALIASES = {
    "scanid": "scan_id",
    "seriesinstanceuid": "scan_id",
    "studyid": "study_id",
    "studyinstanceuid": "study_id",
    "patientid": "patient_id",
}
_PANDAS_INDEX = "__index_level_0__"
_COUNTS = re.compile(r"(?:Row #(\d+): )?(Expected \d+ columns, got \d+)")
_PLAIN_TYPES = (
    pa.types.is_primitive,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_decimal,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelTable:
    """A label table that was read and checked; each id once."""

    source: str
    """File that it came from."""
    id_column: str
    """The finest of `ID_COLUMNS` that it has."""
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
        content = hashlib.sha256(canonical_json(head).encode())
        content.update(np.nan_to_num(self.y[order], nan=-1.0).astype(np.int8).tobytes())
        return content.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """Ids of one side that the other side lacks."""

    count: int
    examples: tuple[str, ...]
    """At most three: ids of scans, or rows of the label table."""


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedLabels:
    """Labels in the order of a table of scans; one line a line of that table."""

    scan_ids: tuple[str, ...]
    study_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    """One for all scans that the catalogue or the label table gives to one patient."""
    findings: tuple[str, ...]
    y: Float32[np.ndarray, "n c"]
    """1, 0, or NaN where unknown; all NaN where no label matched."""
    split: Shaped[np.ndarray, " n"] | None
    """train, validation, test or "" (in none of them); None without a `split` column."""
    matched: Bool[np.ndarray, " n"]
    """Whether the label table has the scan."""
    unmatched_scans: Unmatched
    unmatched_labels: Unmatched
    digest: str
    """Of the label table."""
    known_patients: int
    """Patients that these scans have in the catalogue; more, if the table tells of fewer."""


def read_labels(path: Path | str, *, findings: Sequence[str] | None = None) -> LabelTable:
    """Read and check a label table.

    Args:
        path: `.parquet`, or else CSV with comma, semicolon or tab.
        findings: Columns that are findings, in this order; None is every column but the ids and
            `split`, in the order of the table.

    Raises:
        LabelError: If the file cannot be read, has no id column or no finding, lacks a finding
            asked for, or holds a value other than 1, 0 and nothing, an unknown split, a line
            without id, or lines of one id that contradict each other or name two patients.
    """
    path = Path(path)
    table = _read_table(path)
    id_column = next((name for name in ID_COLUMNS if name in table.column_names), None)
    if id_column is None:
        raise LabelError(
            f"{path} has no id column: it needs scan_id, study_id or patient_id, and has "
            f"{some(map(repr, table.column_names))}"
        )
    names = _finding_columns(table, findings, source=path)
    columns = [_binary(table, name=name, source=path) for name in names]
    typed = _ids(table, name=id_column, source=path)
    ids, y, split = _merged(
        typed,
        np.stack(columns, axis=1).astype(np.float32),
        _splits(table, source=path),
        what=f"{path}: {id_column}",
    )
    row_of = _first_rows(typed, range(1, len(typed) + 1))
    return LabelTable(
        source=str(path),
        id_column=id_column,
        ids=tuple(ids),
        rows=tuple(row_of[one] for one in ids),
        findings=names,
        y=y,
        split=split,
        patients=_patients(table, typed, id_column=id_column, source=path),
    )


def join_labels(table: LabelTable, scans: pa.Table, *, key: bytes | None = None) -> JoinedLabels:
    """Find the labels of scans.

    Args:
        table: As `read_labels` gave it.
        scans: Lines of a feature store or a catalogue, with the three ids.
        key: Of the pseudonyms; with it a label table may hold original ids, pseudonyms or both.

    Raises:
        LabelError: If no id matches, or a patient is in two splits.
    """
    scan_side: list[str] = scans[table.id_column].to_pylist()
    known = set(scan_side)
    typed = _as_in_scans(table, known, key=key)
    ids, y, split = _merged(
        typed,
        table.y,
        table.split,
        what=f"{table.source}: {table.id_column}",
    )
    row_of = _first_rows(typed, table.rows)
    line_of = {one: line for line, one in enumerate(ids)}
    lines = np.array([line_of.get(one, -1) for one in scan_side], dtype=np.int64)
    matched = lines >= 0
    if not matched.any():
        raise _nothing_matched(table, scan_side, key=key)
    known_patients = scans["patient_id"].to_pylist()
    joined = JoinedLabels(
        scan_ids=tuple(scans["scan_id"].to_pylist()),
        study_ids=tuple(scans["study_id"].to_pylist()),
        patient_ids=_grouped(table, typed, scan_side, own=known_patients, key=key),
        findings=table.findings,
        y=np.where(matched[:, None], y[lines], np.float32(np.nan)),
        split=None if split is None else np.where(matched, split[lines], ""),
        matched=matched,
        unmatched_scans=_unmatched(one for one in dict.fromkeys(scan_side) if one not in line_of),
        unmatched_labels=_unmatched(f"row {row_of[one]}" for one in ids if one not in known),
        digest=table.digest,
        known_patients=len(set(known_patients)),
    )
    _check_patients(joined, source=table.source)
    return joined


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix.lower() in {".parquet", ".pq"}:
            table = pq.read_table(path)
        else:
            table = _read_csv(path)
    except FileNotFoundError:
        raise LabelError(f"no label table is at {path}: name a .csv or .parquet file") from None
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise LabelError(f"cannot read labels from {path}: {_cause(error)}") from None
    if not table.num_rows:
        raise LabelError(f"{path} has no row below its header: it needs one for each scan or study")
    names = [_id_named(name) or name.strip() for name in table.column_names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LabelError(f"{path} has more than one column {twice[0]!r}: rename or remove one")
    table = table.rename_columns(names)
    return table.drop_columns(_PANDAS_INDEX) if _PANDAS_INDEX in names else table


def _read_csv(path: Path) -> pa.Table:
    """Every column as text: a number in place of an id would lose its leading zeros."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    delimiter = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    return pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(use_threads=False),  # else an error has no row
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )


def _id_named(name: str) -> str | None:
    """The id column that a header means (`Study_ID`, `StudyInstanceUID` …), None if none."""
    return _ALIASES.get(name.strip().lower().replace("_", ""))


def _cause(error: Exception) -> str:
    """What is wrong with a file; Arrow's message would go on with what the row holds."""
    counts = _COUNTS.search(str(error))
    if counts is None:
        return str(error)
    row = f"row {int(counts[1]) - 1}: " if counts[1] else ""  # Arrow counts the header
    return f"{row}{counts[2].lower()} (is a quote or a delimiter too many?)"


def _first_rows(ids: Sequence[str], rows: Sequence[int]) -> dict[str, int]:
    """The first row of each id."""
    return dict(zip(reversed(ids), reversed(rows), strict=True))


def _finding_columns(
    table: pa.Table, asked: Sequence[str] | None, *, source: Path
) -> tuple[str, ...]:
    reserved = {*ID_COLUMNS, SPLIT_COLUMN}
    present = [name for name in table.column_names if name not in reserved]
    if not present or (asked is not None and not asked):
        raise LabelError(f"{source} has no finding: it needs a column of 1 and 0 for each")
    if asked is None:
        return tuple(present)
    unknown = [name for name in asked if name not in present]
    if unknown:
        near = get_close_matches(unknown[0], present, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {some(map(repr, present))}"
        raise LabelError(f"{source} has no finding {unknown[0]!r}: {hint}")
    return tuple(dict.fromkeys(asked))


def _column(table: pa.Table, name: str, *, source: Path) -> pa.ChunkedArray:
    """A column of numbers or texts; codes as what they stand for, an empty one as text."""
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if not any(is_plain(column.type) for is_plain in _PLAIN_TYPES):
        raise LabelError(
            f"{source}: column {name!r} holds {column.type}, and must hold one number or text a "
            "row. If it is no finding, name the findings with --findings a,b,…"
        )
    return column


def _ids(table: pa.Table, *, name: str, source: Path) -> list[str]:
    column = _column(table, name, source=source)
    if pa.types.is_floating(column.type):
        raise LabelError(
            f"{source}: {name} holds decimal numbers, which ids lose digits in: write it as text"
        )
    ids = [(one or "").strip() for one in column.cast(pa.string()).to_pylist()]
    if "" in ids:
        raise LabelError(f"{source}: row {ids.index('') + 1} has no {name}: fill it or remove it")
    return ids


def _patients(
    table: pa.Table, typed: Sequence[str], *, id_column: str, source: Path
) -> tuple[str, ...] | None:
    """The patient of each distinct id, from a column that is not the id's own."""
    if id_column == "patient_id" or "patient_id" not in table.column_names:
        return None
    column = _column(table, "patient_id", source=source).cast(pa.string())
    said = ["" if _is_unknown(one) else one.strip() for one in column.to_pylist()]
    patients: dict[str, str] = {}
    for row, (one, patient) in enumerate(zip(typed, said, strict=True), 1):
        if patient and patients.get(one, patient) != patient:
            raise LabelError(
                f"{source}: {id_column} of row {row} has another patient_id in an earlier row: "
                "a scan or study is of one patient"
            )
        patients[one] = patient or patients.get(one, "")
    return tuple(patients.values())


def _grouped(
    table: LabelTable,
    typed: Sequence[str],
    scan_side: Sequence[str],
    *,
    own: Sequence[str],
    key: bytes | None,
) -> tuple[str, ...]:
    """One id for all scans of a patient; what the table alone says of one never gets out."""
    if table.patients is None:
        return tuple(own)
    known, pseudonyms = set(own), Pseudonyms(key)
    made = [
        one if one in known or key is None or not one else pseudonyms.patient(one)
        for one in table.patients
    ]
    said_of = {one: patient for one, patient in zip(typed, made, strict=True) if patient}
    said = [said_of.get(one, "") for one in scan_side]
    groups = patient_groups(own, said).tolist()
    names: dict[int, str] = {}
    # The table's first: with the key it is a pseudonym, and stays that when the cohort grows.
    for ids in (said if key is not None else own, own):
        first: dict[int, str] = {}
        for group, one in zip(groups, ids, strict=True):
            if one:
                first[group] = min(one, first.get(group, one))
        names = first | names
    return tuple(names[group] for group in groups)


def _binary(table: pa.Table, *, name: str, source: Path) -> Float32[np.ndarray, " n"]:
    values, codes = _encoded(_column(table, name, source=source))
    meanings = [_meaning(value) for value in values]
    bad = [code for code, meaning in enumerate(meanings) if meaning is None]
    if bad:
        row = int(np.flatnonzero(np.isin(codes, bad))[0])
        raise LabelError(
            f"{source}: column {name!r} holds {_kind(values[codes[row]])} in row {row + 1}: a "
            "finding is 1, 0, or empty where unknown. If it is no finding, name the findings with "
            "--findings a,b,…"
        )
    return np.asarray(np.array(meanings, dtype=np.float32)[codes])


def _splits(table: pa.Table, *, source: Path) -> Shaped[np.ndarray, " n"] | None:
    if SPLIT_COLUMN not in table.column_names:
        return None
    values, codes = _encoded(_column(table, SPLIT_COLUMN, source=source))
    names = ["" if _is_unknown(value) else split_named(str(value)) for value in values]
    if None in names:
        row = int(np.flatnonzero(codes == names.index(None))[0])
        raise LabelError(
            f"{source}: split is {values[codes[row]]!r} in row {row + 1}: it must be "
            f"{', '.join(SPLITS)}, or empty for a scan that is not used"
        )
    return np.asarray(np.array(names, dtype="<U10")[codes])


def _encoded(column: pa.ChunkedArray) -> tuple[list[Any], Shaped[np.ndarray, " n"]]:
    """Distinct values, None the last of them, and which of them each line holds."""
    encoded = pa.concat_arrays(column.chunks or [pa.array([], column.type)]).dictionary_encode()
    values = [*encoded.dictionary.to_pylist(), None]
    return values, encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)


def _meaning(value: Any) -> float | None:
    """1, 0, NaN for unknown, None for what is no label."""
    if _is_unknown(value):
        return float("nan")
    text = str(value).strip().lower()
    try:
        number = _WORDS[text] if text in _WORDS else float(text)
    except ValueError:
        return None
    return number if number in (0.0, 1.0) else None


def _kind(value: Any) -> str:
    """A value as it may be shown: a small number, else what kind it is."""
    try:
        number = float(value)
    except ValueError:
        return "text"
    return repr(value) if abs(number) < 1000 else "a large number"


def _is_unknown(value: Any) -> bool:
    return value is None or str(value).strip().lower() in _UNKNOWN


def _merged(
    ids: list[str],
    y: Float32[np.ndarray, "n c"],
    split: Shaped[np.ndarray, " n"] | None,
    *,
    what: str,
) -> tuple[list[str], Float32[np.ndarray, "m c"], Shaped[np.ndarray, " m"] | None]:
    """Each id once; lines of one id complete each other and must not contradict each other."""
    place = {one: i for i, one in enumerate(dict.fromkeys(ids))}
    if len(place) == len(ids):
        return ids, y, split
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
    if contradicted.any():
        rows = np.flatnonzero(to == np.flatnonzero(contradicted)[0]) + 1
        raise LabelError(
            f"{what} is the same in rows {some(rows.tolist())}, which contradict each other "
            f"({int(contradicted.sum())} such ids): keep one row, or make them agree"
        )
    return list(place), low, merged_split


def _as_in_scans(table: LabelTable, known: set[str], *, key: bytes | None) -> list[str]:
    """Ids of the table as the scans have them: as they are, or else their pseudonyms."""
    if key is None:
        return list(table.ids)
    pseudonyms = Pseudonyms(key)
    make = {
        "scan_id": pseudonyms.scan,
        "study_id": pseudonyms.study,
        "patient_id": pseudonyms.patient,
    }[table.id_column]
    made = {one: make(one) for one in table.ids if one not in known}
    return [made[one] if made.get(one) in known else one for one in table.ids]


def _nothing_matched(table: LabelTable, scan_side: list[str], *, key: bytes | None) -> LabelError:
    remedy = (
        "these are ids of another cohort, or another kind of id"
        if key is not None
        else "if the labels hold original ids, join them with the key of the pseudonyms, which "
        "scans.private.parquet holds"
    )
    return LabelError(
        f"no {table.id_column} of {table.source} ({len(table.ids)} ids) is one of the scans', "
        f"which have {some(map(repr, dict.fromkeys(scan_side)))}: {remedy}"
    )


def _check_patients(joined: JoinedLabels, *, source: str) -> None:
    if joined.split is None:
        return
    seen: dict[str, set[str]] = {}
    for patient, split in zip(joined.patient_ids, joined.split.tolist(), strict=True):
        if split:
            seen.setdefault(patient, set()).add(split)
    torn = [patient for patient, splits in seen.items() if len(splits) > 1]
    if torn:
        raise LabelError(
            f"{source}: {len(torn)} of {len(seen)} patients are in more than one split, e.g. "
            f"{torn[0]!r} in {' and '.join(sorted(seen[torn[0]]))}: give all scans of a patient "
            "one split, or remove the column and splits are drawn by patient"
        )


def _unmatched(ids: Any) -> Unmatched:
    ids = list(ids)
    return Unmatched(count=len(ids), examples=tuple(ids[:3]))
