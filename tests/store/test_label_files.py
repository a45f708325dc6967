"""One table, however a program wrote it, is one and the same table."""

import datetime
import decimal
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.store.errors import LabelError
from ctfm.store.label_rules import LabelRules
from ctfm.store.labels import inspect_labels, read_labels

FRAME = pd.DataFrame(
    {
        "StudyInstanceUID": ["001", "002", "003"],
        "Blutung": [1, 0, None],
        "Befund": ['Hygrom, 5" "frisch"\nkein Shift', "ohne; Befund", "ü"],
        "Split": ["train", "val", "test"],
    }
)


LAUGHS: bytes = (
    b'<?xml version="1.0"?><!DOCTYPE w [<!ENTITY a "'
    + b"ha" * 5000
    + b'"><!ENTITY b "'
    + b"&a;" * 5000
    + b'"><!ENTITY c "'
    + b"&b;" * 5000
    + b'">]><workbook>&c;</workbook>'
)


def read(path: Path, **rules: Any) -> Any:
    return read_labels(path, rules=LabelRules(**rules))


def check(path: Path) -> None:
    table = read(path)
    assert table.ids == ("001", "002", "003")
    assert table.findings == ("Blutung",)
    np.testing.assert_array_equal(table.y[:, 0], np.array([1, 0, np.nan], np.float32))
    assert table.split is not None
    assert table.split.tolist() == ["train", "validation", "test"]


class TestCsv:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-32"])
    @pytest.mark.parametrize("sep", [",", ";", "\t", "|"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_of_any_encoding_and_delimiter(
        self, tmp_path: Path, encoding: str, sep: str, end: str
    ) -> None:
        path = tmp_path / "l.csv"
        FRAME.to_csv(path, sep=sep, encoding=encoding, lineterminator=end, index=False)
        check(path)

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
    def test_of_utf_16_without_a_mark(self, tmp_path: Path, encoding: str) -> None:
        path = tmp_path / "l.csv"
        path.write_bytes(FRAME.to_csv(index=False).encode(encoding))
        check(path)

    def test_of_decimal_commas(self, tmp_path: Path) -> None:
        path = tmp_path / "l.csv"
        FRAME.to_csv(path, sep=";", decimal=",", index=False)
        assert "1,0" in path.read_text()
        check(path)

    def test_with_an_unnamed_index(self, tmp_path: Path) -> None:
        path = tmp_path / "l.csv"
        FRAME.iloc[:2].to_csv(path)
        assert read(path).findings == ("Blutung",)

    @pytest.mark.parametrize(
        ("change", "note"),
        [
            (lambda text: text.replace("\n", ",\n"), "1 blank columns without a name"),
            (lambda text: text.replace("\n", ",,\n").replace(",,\n", "\n", 1), None),
            (lambda text: f"sep=,\n{text}", None),
            (lambda text: f"\n\n{text}\n\n,,\n", None),
            (lambda text: f"export of 5 May\n\n{text}", "1 lines above the header"),
            (lambda text: f"# made by x, y\n{text}# the end\n", "1 rows that begin with #"),
            (lambda text: text.replace(",", ", "), None),
        ],
    )
    def test_with_what_is_no_part_of_the_table(
        self, tmp_path: Path, change: Callable[[str], str], note: str | None
    ) -> None:
        text = "StudyInstanceUID,Blutung,Split\n001,1,train\n002,0,val\n003,,test\n"
        path = tmp_path / "l.csv"
        path.write_text(change(text))
        check(path)
        notes = inspect_labels(path, LabelRules()).notes
        assert note is None or f"passed over: {note}" in notes

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"\xd0\xcf\x11\xe0\xa1\xb1", r"old Excel file \(.xls\), or one with a password"),
            (b"\x1f\x8b\x08", "compressed: unpack it"),
            (b"$FL2@(#) SPSS", "an SPSS file"),
            (b"PK\x03\x04", "cut short or damaged"),
            (b"study_id,mass\n\x81,1\n", "no text in UTF-8, UTF-16 or Windows-1252"),
            (b" \n\n", "it is empty"),
        ],
    )
    def test_that_is_none_is_called_what_it_is(
        self, tmp_path: Path, content: bytes, said: str
    ) -> None:
        (tmp_path / "l.csv").write_bytes(content)
        with pytest.raises(LabelError, match=f"cannot read labels from .*{said}"):
            read(tmp_path / "l.csv")

    def test_with_a_row_name_more_than_the_header(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("study_id,mass\n1,001,1\n2,002,0\n")
        with pytest.raises(
            LabelError, match=r"row 1: expected 2 columns, got 3 .and rows 2.*short"
        ):
            read(tmp_path / "l.csv")

    def test_rows_are_those_of_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("title\n\nstudy_id,mass\n1,1\n\n#,\n1,0\n")
        with pytest.raises(LabelError, match="rows 1, 4, which contradict"):
            read(tmp_path / "l.csv")


class TestWorkbook:
    def write(self, path: Path, *sheets: Sequence[Sequence[Any]]) -> openpyxl.Workbook:
        book = openpyxl.Workbook()
        for number, rows in enumerate(sheets):
            sheet = book.create_sheet(f"s{number}")
            for row in rows:
                sheet.append(row)
        del book["Sheet"]
        book.save(path)
        return book

    def test_of_pandas(self, tmp_path: Path) -> None:
        path = tmp_path / "l.xlsx"
        FRAME.to_excel(path, index=False)
        check(path)

    def test_whatever_its_name_ends_with(self, tmp_path: Path) -> None:
        FRAME.to_excel(tmp_path / "l.xlsx", index=False)
        (tmp_path / "l.xlsx").rename(tmp_path / "l.csv")
        check(tmp_path / "l.csv")

    def test_numbers_dates_and_truth_are_what_they_show(self, tmp_path: Path) -> None:
        rows: list[list[Any]] = [
            ["PatientID", "mass", "seen", "edema"],
            [101, 1.0, datetime.date(2020, 1, 2), True],
            [102, 0, datetime.date(2020, 1, 3), False],
        ]
        self.write(tmp_path / "l.xlsx", rows)
        table = read(tmp_path / "l.xlsx")
        assert (table.ids, table.findings) == (("101", "102"), ("mass", "edema"))
        assert table.y.tolist() == [[1, 1], [0, 0]]
        why = {use.name: use.why for use in table.columns}
        assert why["seen"] == "holds dates"

    def test_numbers_of_more_digits_than_excel_keeps_are_no_ids(self, tmp_path: Path) -> None:
        ids = (1234567890123456, 1234567890123457)
        self.write(tmp_path / "l.xlsx", [["study_id", "mass"], *([one, one % 2] for one in ids)])
        with pytest.raises(LabelError, match="a rounded decimal number"):
            read(tmp_path / "l.xlsx")

    def test_the_sheet_is_the_one_with_ids_or_the_one_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "l.xlsx"
        labels: list[list[Any]] = [["study_id", "mass"], ["a", 1], ["b", 0]]
        self.write(path, [["about"], ["made by hand"]], [["x"], *labels])
        assert read(path).ids == ("a", "b")
        self.write(path, labels, [*labels[:2], ["c", 0]])
        with pytest.raises(LabelError, match=r"several of its sheets .*'s0', 's1'.*--sheet"):
            read(path)
        assert read(path, sheet="s1").ids == ("a", "c")
        with pytest.raises(LabelError, match="no sheet 's2': it has 's0', 's1'"):
            read(path, sheet="s2")

    def test_a_size_that_a_sheet_claims_does_not_cut_it(self, tmp_path: Path) -> None:
        path = tmp_path / "l.xlsx"
        self.write(path, [["study_id", "mass"], ["a", 1], ["b", 0]])
        rewrite(path, "sheet1.xml", lambda xml: xml.replace(b'ref="A1:B3"', b'ref="A1"'))
        assert read(path).y.tolist() == [[1], [0]]

    def test_a_formula_is_its_value_and_without_one_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "l.xlsx"
        rows = [["study_id", "mass"], ["a", '=IF(1,"yes","")'], ["b", '=IF(0,"yes","")']]
        self.write(path, rows)
        with pytest.raises(LabelError, match="formulas in rows 2, 3 of sheet 's0' have no value"):
            read(path)
        computed = iter((b"<v>yes</v></c>", b"<v></v></c>"))

        def compute(xml: bytes) -> bytes:
            while b"<v /></c>" in xml or b"<v/></c>" in xml:
                xml = xml.replace(b"<v />", b"<v/>")
                xml = xml.replace(b"<v/></c>", next(computed), 1)
            return xml.replace(b'<c r="B2">', b'<c r="B2" t="str">').replace(
                b'<c r="B3">', b'<c r="B3" t="str">'
            )

        rewrite(path, "sheet1.xml", compute)
        np.testing.assert_array_equal(read(path).y, np.array([[1], [np.nan]], np.float32))

    def test_merged_cells_are_refused_unless_above_the_header(self, tmp_path: Path) -> None:
        path = tmp_path / "l.xlsx"
        book = self.write(path, [["title"], ["study_id", "mass"], ["a", 1], ["b", None]])
        book["s0"].merge_cells("A1:B1")
        book.save(path)
        assert read(path).ids == ("a", "b")
        book["s0"].merge_cells("B3:B4")
        book.save(path)
        with pytest.raises(LabelError, match="merged over several rows, from rows 3 of"):
            read(path)

    @pytest.mark.parametrize(
        ("part", "change"),
        [
            ("sheet1.xml", lambda xml: xml[: len(xml) // 2]),
            ("sheet1.xml", lambda xml: xml.replace(b'r="3"', b'r="99999999"')),
            ("workbook.xml", lambda xml: b"<x/>"),
            ("workbook.xml", lambda xml: LAUGHS + xml[xml.index(b"<workbook") :]),
            ("[Content_Types].xml", lambda xml: b""),
        ],
    )
    def test_a_damaged_or_hostile_one_is_an_error(
        self, tmp_path: Path, part: str, change: Callable[[bytes], bytes]
    ) -> None:
        path = tmp_path / "l.xlsx"
        self.write(path, [["study_id", "mass"], ["a", 1], ["b", 0]])
        rewrite(path, part, change)
        with pytest.raises(LabelError):
            read(path)

    def test_a_bomb_is_not_unpacked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "l.xlsx"
        self.write(path, [["study_id", "mass"], ["a", 1]])
        monkeypatch.setattr("ctfm.store.label_sheets.MAX_BYTES", 1000)
        with pytest.raises(LabelError, match="more than a table of labels has"):
            read(path)

    def test_another_archive_is_no_workbook(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "l.xlsx", "w") as archive:
            archive.writestr("labels.csv", "study_id,mass\na,1\n")
        with pytest.raises(LabelError, match="a zip archive and no Excel workbook: unpack it"):
            read(tmp_path / "l.xlsx")


def rewrite(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change one part of a workbook."""
    with zipfile.ZipFile(path) as archive:
        parts = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in parts.items():
            archive.writestr(one, change(content) if one.endswith(name) else content)


class TestParquet:
    @pytest.mark.parametrize(
        "column",
        [
            pa.array(["1", "0", None], pa.string_view()),
            pa.array(["1", "0", None], pa.large_string()),
            pa.array([decimal.Decimal(1), decimal.Decimal(0), None], pa.decimal128(3, 1)),
            pa.array([decimal.Decimal(1), decimal.Decimal(0), None], pa.decimal64(3, 1)),
            pa.array([decimal.Decimal(1), decimal.Decimal(0), None], pa.decimal32(3, 1)),
            pa.array([1, 0, None], pa.uint64()),
            pa.array(["Yes", "No", "NA"]).dictionary_encode(),
        ],
    )
    def test_labels_of_any_plain_type(self, tmp_path: Path, column: pa.Array) -> None:
        path = tmp_path / "l.parquet"
        pq.write_table(pa.table({"study_id": [1.0, 2.0, 3.0], "Blutung": column}), path)
        table = read(path)
        assert table.ids == ("1", "2", "3")
        np.testing.assert_array_equal(table.y[:, 0], np.array([1, 0, np.nan], np.float32))

    @pytest.mark.parametrize(
        "kind",
        [
            pa.timestamp("us"),
            pa.timestamp("ns", "Europe/Berlin"),
            pa.date32(),
            pa.time32("ms"),
            pa.time64("ns"),
            pa.duration("ms"),
        ],
    )
    def test_a_time_is_no_finding_and_has_the_answers_of_csv(
        self, tmp_path: Path, kind: pa.DataType
    ) -> None:
        path = tmp_path / "l.parquet"
        number = pa.array([0, 1], kind)
        pq.write_table(pa.table({"study_id": ["a", "b"], "mass": [1, 0], "when": number}), path)
        assert read(path).findings == ("mass",)
        (why,) = (use.why for use in read(path).columns if use.name == "when")
        assert why == f"holds {kind}"
        for rules in ({"findings": ("when",)}, {"id_column": "when=study_id"}):
            with pytest.raises(LabelError, match="column 'when' holds "):
                read(path, **rules)


def test_a_damaged_file_is_a_table_or_an_error_that_is_explained(tmp_path: Path) -> None:
    FRAME.to_excel(tmp_path / "l.xlsx", index=False)
    FRAME.to_parquet(tmp_path / "l.parquet", compression=None)
    whole = [
        FRAME.to_csv(index=False).encode(),
        FRAME.to_csv(index=False, sep=";").encode("utf-16"),
        (tmp_path / "l.xlsx").read_bytes(),
        (tmp_path / "l.parquet").read_bytes(),
    ]
    random = np.random.default_rng(0)
    for trial in range(200):
        content = bytearray(whole[trial % len(whole)])
        for place in random.integers(len(content), size=3):
            content[place] = random.choice([0, 10, 34, 44, 255, int(random.integers(256))])
        if trial % 3 == 0:
            del content[random.integers(len(content)) :]
        (tmp_path / "l.csv").write_bytes(content)
        with suppress(LabelError):
            inspect_labels(tmp_path / "l.csv", LabelRules())
