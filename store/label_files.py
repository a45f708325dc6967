"""Label files: from a table in CSV, Excel or Parquet, to columns of text.

What a file is says its content, not its name. CSV may be UTF-8, UTF-16 or else Windows-1252, with
comma, semicolon, tab or bar, as the columns come out best. The header is the first of the first
lines that names an id column; what is above it, blank rows and columns, and rows that begin with #
and hold nothing else are passed over and counted. Every cell stays the text that it was: a number
in place of an id would lose its leading zeros. No message repeats a cell.

Rows count from 1 below the header, as the file has them, with blank ones.
"""

import codecs
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from ctfm.store.errors import LabelError, some
from ctfm.store.label_sheets import read_sheet

HEADER_WITHIN = 20
"""The header is one of so many first lines that are not blank."""

_PROBE = 100
"""Lines that tell the delimiter."""
_PROBE_CHARACTERS = 1 << 20
_DELIMITERS = ",;\t|"
_HINT = "sep="
_PANDAS_INDEX = "__index_level_0__"
_SIGNATURES = {
    b"\xd0\xcf\x11\xe0": "an old Excel file (.xls), or one with a password: save it as CSV",
    b"$FL": "an SPSS file: export it as CSV",
    b"\x1f\x8b": "compressed: unpack it",
    b"<stata_dta>": "a Stata file: export it as CSV",
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PLAIN_TYPES = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_null,
)

Record = tuple[int, Sequence[str]]
"""Number of a line of the file, from 1, and its cells."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTable:
    """A file as a table of text."""

    source: str
    form: str
    """What the file is, for people."""
    names: tuple[str, ...]
    """Of the columns, as the header has them, without space around them; "" without a name."""
    columns: tuple[pa.Array, ...]
    """Text; null is an empty cell, as "" is."""
    kinds: tuple[str, ...]
    """"" for a column of text and numbers, else what Parquet type it has."""
    rows: Int64[np.ndarray, " n"]
    """Number of each row below the header."""
    notes: tuple[str, ...] = ()
    """What was passed over."""


def read_text_table(path: Path, *, sheet: str | None, is_id: Callable[[str], bool]) -> TextTable:
    """Read a file.

    Args:
        path: Of the file.
        sheet: Of a workbook; None is the only one with a header that names an id.
        is_id: Whether a cell of a header names an id column.

    Raises:
        LabelError: If the file cannot be read, is no table, or has no row below its header.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(16)
        if begin.startswith(b"PAR1"):
            table = _read_parquet(path)
        elif begin.startswith(b"PK\x03\x04"):
            found = read_sheet(path, sheet=sheet, is_id=is_id, within=HEADER_WITHIN)
            table = _table(path, found.records, form=found.form, is_id=is_id)
        else:
            table = _read_csv(path, is_id=is_id)
    except FileNotFoundError:
        raise LabelError(
            f"no label table is at {path}: name a .csv, .xlsx or .parquet file"
        ) from None
    except OSError as error:
        raise LabelError(f"cannot read labels from {path}: {error}") from None
    if not len(table.rows):
        raise LabelError(f"{path} has no row below its header: it needs one for each scan or study")
    return table


def _read_parquet(path: Path) -> TextTable:
    try:
        table = pq.read_table(path)
        if _PANDAS_INDEX in table.column_names:
            table = table.drop_columns(_PANDAS_INDEX)
        columns = [_as_text(column) for column in table.columns]
        for column, _ in columns:
            column.validate(full=True)  # else damaged text breaks where it is looked at
    except OSError:
        raise
    except Exception as error:
        raise LabelError(
            f"cannot read labels from {path}: it is no whole Parquet file "
            f"({type(error).__name__}): write it again"
        ) from None
    return TextTable(
        source=str(path),
        form="Parquet",
        names=tuple(map(_header, table.column_names)),
        columns=tuple(column for column, _ in columns),
        kinds=tuple(kind for _, kind in columns),
        rows=np.arange(1, table.num_rows + 1),
    )


def _as_text(column: pa.ChunkedArray) -> tuple[pa.Array, str]:
    """A column of numbers or texts as text, or an empty one and the type that it has."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not any(is_plain(column.type) for is_plain in _PLAIN_TYPES):
        return pa.nulls(len(column), pa.string()), str(column.type)
    try:
        text = column.cast(pa.string())
    except pa.ArrowNotImplementedError:  # decimal32 before Arrow 20
        values = [None if one is None else str(one) for one in column.to_pylist()]
        text = pa.chunked_array([pa.array(values, pa.string())])
    return pa.concat_arrays(text.chunks or [pa.array([], pa.string())]), ""


def _read_csv(path: Path, *, is_id: Callable[[str], bool]) -> TextTable:
    content = path.read_bytes()
    for signature, what in _SIGNATURES.items():
        if content.startswith(signature):
            raise LabelError(f"cannot read labels from {path}: it is {what}")
    if not content.strip():
        raise LabelError(f"cannot read labels from {path}: it is empty")
    text, encoding = _decoded(content, path=path)
    hinted, text = _without_hint(text)
    delimiter = hinted or _delimiter(text, is_id=is_id)
    shown = {"\t": "tab"}.get(delimiter, repr(delimiter))
    records: list[Record] = []
    reader = _parsed(text, delimiter)
    try:
        records.extend(enumerate(reader, 1))
    except csv.Error:
        raise LabelError(
            f"cannot read labels from {path}: from line {reader.line_num} on a quote is too many, "
            "or one is not closed"
        ) from None
    return _table(path, records, form=f"CSV ({encoding}, {shown} between cells)", is_id=is_id)


def _decoded(content: bytes, *, path: Path) -> tuple[str, str]:
    """The text, and the name of its encoding."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    probe = content[:4096]
    if encoding is None and probe.count(0) > len(probe) // 4:
        encoding = "utf-16-le" if probe[1::2].count(0) >= probe[::2].count(0) else "utf-16-be"
    tried = [encoding] if encoding else ["utf-8", "cp1252"]
    for name in tried:
        try:
            text = content.decode(name)
        except UnicodeDecodeError:
            continue
        shown = {"utf-8-sig": "UTF-8", "cp1252": "Windows-1252"}.get(name, name.upper())
        return text.lstrip("\ufeff"), shown
    raise LabelError(
        f"cannot read labels from {path}: it is no text in UTF-8, UTF-16 or Windows-1252: save it "
        "as UTF-8"
    )


def _without_hint(text: str) -> tuple[str | None, str]:
    """The delimiter that Excel's first line `sep=;` names, and what is below it."""
    first, _, rest = text.partition("\n")
    named = first.strip('\r"')
    if named.lower().startswith(_HINT) and len(named) == len(_HINT) + 1:
        return named[-1], rest
    return None, text


def _parsed(text: str, delimiter: str) -> Any:
    """The reader of the csv module."""
    # Not strict, a quote that is never closed would swallow all rows after it.
    lines = io.StringIO(text, newline="")
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)


def _delimiter(text: str, *, is_id: Callable[[str], bool]) -> str:
    """The delimiter with which the first lines look most like a table."""

    def likeness(delimiter: str) -> tuple[bool, bool, float, int]:
        lines: list[list[str]] = []
        with suppress(csv.Error):  # of another delimiter, or a cell that the probe cuts
            for line in islice(_parsed(text[:_PROBE_CHARACTERS], delimiter), _PROBE):
                lines.append(line)
        widths = Counter(len(line) for line in lines if line)
        width, count = max(widths.items(), key=lambda one: (one[1], one[0]), default=(0, 0))
        named = any(is_id(cell) for line in lines[:HEADER_WITHIN] for cell in line)
        return named, width > 1, count / max(1, widths.total()), width

    return max(_DELIMITERS, key=likeness)


def _table(
    path: Path, records: Iterable[Record], *, form: str, is_id: Callable[[str], bool]
) -> TextTable:
    """Lines as columns under their header."""
    filled = [(line, cells) for line, cells in records if any(cell.strip() for cell in cells)]
    top = header_place([cells for _, cells in filled[:HEADER_WITHIN]], is_id=is_id)
    if top is None:
        raise LabelError(f"cannot read labels from {path}: it is empty")
    header_line, header = filled[top]
    names = [_header(cell) for cell in header]
    body = [(line - header_line, cells) for line, cells in filled[top + 1 :]]
    kept = [(row, cells) for row, cells in body if not _is_comment(cells)]
    _check_widths(path, kept, width=len(names))
    across = zip(*(cells for _, cells in kept), strict=False)
    columns = [pa.array(texts, pa.string()) for texts in islice(across, len(names))]
    columns = columns or [pa.array([], pa.string())] * len(names)
    used = [i for i, name in enumerate(names) if name or _is_filled(columns[i])]
    passed = {
        "lines above the header": top,
        "rows that begin with #": len(body) - len(kept),
        "blank columns without a name": len(names) - len(used),
    }
    return TextTable(
        source=str(path),
        form=form,
        names=tuple(names[i] for i in used),
        columns=tuple(columns[i] for i in used),
        kinds=("",) * len(used),
        rows=np.array([row for row, _ in kept], dtype=np.int64),
        notes=tuple(f"passed over: {count} {what}" for what, count in passed.items() if count),
    )


def header_place(lines: Sequence[Sequence[str]], *, is_id: Callable[[str], bool]) -> int | None:
    """Which of the first lines is the header: one that names an id, else the first."""
    for place, cells in enumerate(lines):
        if any(is_id(cell) for cell in cells):
            return place
    return 0 if lines else None


def _header(cell: str) -> str:
    return " ".join(part.strip() for part in cell.splitlines()).strip()


def _is_comment(cells: Sequence[str]) -> bool:
    return cells[0].lstrip().startswith("#") and not any(cell.strip() for cell in cells[1:])


def _is_filled(column: pa.Array) -> bool:
    return any(cell.strip() for cell in column.unique().to_pylist())


def _check_widths(path: Path, body: Sequence[Record], *, width: int) -> None:
    """Refuse rows with cells too many, or too few; blank ones at the end are none too many.

    Raises:
        LabelError: With the rows.
    """
    torn = [
        (row, len(cells))
        for row, cells in body
        if len(cells) < width or any(cell.strip() for cell in cells[width:])
    ]
    if torn:
        row, got = torn[0]
        others = f" (and rows {some(row for row, _ in torn[1:])})" if len(torn) > 1 else ""
        raise LabelError(
            f"cannot read labels from {path}: row {row}: expected {width} columns, got {got}"
            f"{others}: is a quote or a delimiter too many, or the header one short?"
        )
