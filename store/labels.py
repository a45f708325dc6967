"""Labels: from a wide table in CSV or Parquet, to one row of 1, 0 or unknown for each id.

One id column (`scan_id`, `study_id` or `patient_id`, in any case or by its name in DICOM, such as
`StudyInstanceUID`; the finest one present joins), one column a finding with 1, 0 or nothing,
optionally `split`. A `patient_id` beside a finer id says which scans are of one patient, where the
catalogue does not know (`ctfm.store.patients`). Every other column is a finding, whether or not
the taxonomy has it, and must hold nothing but 1 and 0: for a table with further columns (age,
report text) the user names the findings. Unknown is NaN here; every loss and metric masks it. No
message repeats an id or a text of the table, which may name a patient: it says the row.

Everything that can be wrong with a table by itself is found here, before anything is computed; it
is joined to scans by `ctfm.store.label_join`.

Axes: n lines of the table, c findings.
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
from jaxtyping import Float32, Shaped

from ctfm.store.errors import LabelError, some
from ctfm.store.provenance import canonical_json
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
    ids, y, split = merged_lines(
        typed,
        np.stack(columns, axis=1).astype(np.float32),
        _splits(table, source=path),
        what=f"{path}: {id_column}",
    )
    row_of = first_rows(typed, range(1, len(typed) + 1))
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


def first_rows(ids: Sequence[str], rows: Sequence[int]) -> dict[str, int]:
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
        if patient and patients.get(one) not in (None, "", patient):
            raise LabelError(
                f"{source}: {id_column} of row {row} has another patient_id in an earlier row: "
                "a scan or study is of one patient"
            )
        patients[one] = patient or patients.get(one, "")
    return tuple(patients.values())


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


def merged_lines(
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
