"""Label sheets: from an Excel workbook (.xlsx), to the lines of one of its sheets.

A workbook comes from anywhere: it is bounded before it is unpacked, links are not followed, macros
are not read, and whatever the parser makes of damaged parts is a `LabelError`. A formula is the
value that Excel last computed; one without such a value, and cells merged over several rows, would
become unknown without a word, and are refused. Hidden rows and columns are read like others.
"""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctfm.store.errors import LabelError, some

MAX_BYTES = 2 << 30
"""Of all parts of a workbook, unpacked."""
MAX_PARTS = 10_000
MAX_LINES = 1 << 20
"""Lines of a sheet, as in Excel."""

_FORMULA = re.compile(rb"<(?:\w+:)?f[\s/>]")
_MERGED = re.compile(rb"mergeCell\s+ref=\"[A-Z]+(\d+):[A-Z]+(\d+)\"")
_EXACT = 10**15
"""Excel keeps 15 digits of a number."""
_OVERLAP = 64
"""Bytes of a block that are looked at again with the next: longer than what is looked for."""

Line = tuple[int, list[str]]


@dataclass(frozen=True, kw_only=True)
class SheetLines:
    """A sheet as lines of text."""

    records: list[Line]
    """Number of each line that is not blank, from 1, and its cells, all lines equally wide."""
    form: str


def read_sheet(
    path: Path, *, sheet: str | None, is_id: Callable[[str], bool], within: int
) -> SheetLines:
    """Read one sheet of a workbook.

    Args:
        path: Of the workbook.
        sheet: Its name; None is the only one that has a header with an id.
        is_id: Whether a cell of a header names an id column.
        within: Lines among which the header is.

    Raises:
        LabelError: If the workbook is damaged or too large, if it is not clear which sheet is
            meant, or if cells of it have no value of their own.
    """
    _check_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions, which are not read
            with _opened(path, computed=True) as book:
                name = _chosen(path, book, sheet=sheet, is_id=is_id, within=within)
                return _lines(path, book[name])
    except (LabelError, OSError):
        raise
    except Exception as error:
        raise LabelError(
            f"cannot read labels from {path}: it is no whole Excel workbook "
            f"({type(error).__name__}): save it again, or as CSV"
        ) from None


@contextmanager
def _opened(path: Path, *, computed: bool) -> Iterator[Any]:
    """A workbook with the values of its formulas, or with these."""
    import openpyxl

    # A file, not its name, of which openpyxl wants a certain ending.
    with open(path, "rb") as file:
        book = openpyxl.load_workbook(file, read_only=True, data_only=computed, keep_links=False)
        with closing(book):
            yield book


def _check_size(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise LabelError(f"cannot read labels from {path}: it is cut short or damaged") from None
    if not any(part.filename == "[Content_Types].xml" for part in parts):
        raise LabelError(
            f"cannot read labels from {path}: it is a zip archive and no Excel workbook: unpack "
            "it, or save it as .xlsx or CSV"
        )
    unpacked = sum(part.file_size for part in parts)
    if unpacked > MAX_BYTES or len(parts) > MAX_PARTS:
        raise LabelError(
            f"cannot read labels from {path}: {len(parts):,} parts of {unpacked / 1e9:.1f} GB are "
            f"more than a table of labels has (at most {MAX_PARTS:,} of {MAX_BYTES / 1e9:.1f} GB): "
            "save it as CSV"
        )


def _chosen(
    path: Path, book: Any, *, sheet: str | None, is_id: Callable[[str], bool], within: int
) -> str:
    """The sheet that was named, or the only one there is, or the only one that names an id."""
    names = [one.title for one in book.worksheets]
    listed = ", ".join(map(repr, names))
    if sheet is not None:
        if sheet not in names:
            raise LabelError(f"{path} has no sheet {sheet!r}: it has {listed}")
        return sheet
    if len(names) == 1:
        return str(names[0])
    found = [name for name in names if _has_id(book[name], is_id=is_id, within=within)]
    if len(found) != 1:
        some_of = "several of its sheets name" if found else "none of its sheets names"
        raise LabelError(f"{path}: {some_of} an id column ({listed}): say which one with --sheet")
    return str(found[0])


def _has_id(sheet: Any, *, is_id: Callable[[str], bool], within: int) -> bool:
    seen = 0
    for cells in _rows(sheet):
        texts = [_text(cell) for cell in cells]
        if any(map(is_id, texts)):
            return True
        seen += any(texts)
        if seen == within:
            break
    return False


def _rows(sheet: Any, *, values_only: bool = True) -> Iterator[Sequence[Any]]:
    # The size that a sheet claims for itself may be wrong, and would cut it.
    sheet.reset_dimensions()
    for count, cells in enumerate(sheet.iter_rows(values_only=values_only), 1):
        if count > MAX_LINES:
            raise LabelError(f"sheet {sheet.title!r} has more than {MAX_LINES:,} lines")
        yield cells


def _lines(path: Path, sheet: Any) -> SheetLines:
    lines: list[Line] = []
    for number, cells in enumerate(_rows(sheet), 1):
        texts = [_text(cell) for cell in cells]
        while texts and not texts[-1]:
            texts.pop()
        if texts:
            lines.append((number, texts))
    formulas, merged = _looked_through(sheet)
    first = lines[0][0] if lines else 0
    if torn := [top for top, bottom in merged if bottom > top and bottom > first]:
        raise LabelError(
            f"{path}: cells of sheet {sheet.title!r} are merged over several rows, from rows "
            f"{some(torn)} of the sheet on: a merged cell holds its value in its first row only. "
            "Unmerge them and fill each"
        )
    if formulas:
        _check_computed(path, sheet)
    width = max((len(texts) for _, texts in lines), default=0)
    for _, texts in lines:
        texts.extend([""] * (width - len(texts)))
    return SheetLines(records=lines, form=f"sheet {sheet.title!r} of an Excel workbook")


def _looked_through(sheet: Any) -> tuple[bool, list[tuple[int, int]]]:
    """Whether a sheet has formulas, and first and last line of its merged cells."""
    formulas, merged, before = False, {}, b""
    with sheet.parent._archive.open(sheet._worksheet_path) as part:
        while block := part.read(1 << 20):
            block = before + block
            formulas = formulas or bool(_FORMULA.search(block))
            merged.update({one[0]: (int(one[1]), int(one[2])) for one in _MERGED.finditer(block)})
            before = block[-_OVERLAP:]
    return formulas, sorted(merged.values())


def _check_computed(path: Path, computed: Any) -> None:
    """Refuse formulas that Excel has not computed.

    Raises:
        LabelError: With their lines.
    """
    with _opened(path, computed=False) as book:
        pairs = zip(
            _rows(book[computed.title], values_only=False),
            _rows(computed, values_only=False),
            strict=True,
        )
        empty = [
            number
            for number, (formulas, values) in enumerate(pairs, 1)
            if any(map(_lacks_value, formulas, values))
        ]
    if empty:
        raise LabelError(
            f"{path}: formulas in rows {some(empty)} of sheet {computed.title!r} have no value: "
            "open the workbook in Excel and save it, or save it as CSV"
        )


def _lacks_value(formula: Any, computed: Any) -> bool:
    """An empty text is a value: only the type of the cell tells it from none."""
    return formula.data_type == "f" and computed.value is None and computed.data_type != "str"


def _text(cell: Any) -> str:
    """A cell as it would be in CSV; Excel stores every number as a decimal one."""
    if cell is None:
        return ""
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        if abs(cell) >= _EXACT:
            return f"{cell:.15g}"  # with an exponent: the other digits are not those typed
        if cell == int(cell):
            return str(int(cell))
    return str(cell)
