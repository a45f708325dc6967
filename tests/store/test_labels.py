"""Label tables: every way to write them, every way to get them wrong, and the join to scans."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.store.errors import ConfigError, LabelError
from ctfm.store.label_join import JoinedLabels, join_labels, ways_to_join
from ctfm.store.label_rules import LabelRules
from ctfm.store.labels import LabelTable, read_labels
from ctfm.store.pseudonyms import Pseudonyms

NAN = float("nan")
KEY = b"a key that nobody guesses"
ROWS = "".join(f"s{i},{i % 2}\n" for i in range(20))


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def scans(n: int = 4) -> pa.Table:
    """Two scans a study, all four studies' scans of two patients."""
    return pa.table(
        {
            "scan_id": [f"c{i}" for i in range(n)],
            "study_id": [f"s{i // 2}" for i in range(n)],
            "patient_id": [f"p{i // 3}" for i in range(n)],
        }
    )


def join(tmp_path: Path, text: str, *, key: bytes | None = None) -> JoinedLabels:
    return join_labels(read_labels(write_csv(tmp_path / "labels.csv", text)), scans(), key=key)


class TestReading:
    @pytest.mark.parametrize(
        "column",
        [
            [1, 0, None],
            [1.0, 0.0, NAN],
            [True, False, None],
            ["1", "0", ""],
            ["1.0", "0.0", "NaN"],
            [" true", "FALSE", "null"],
            pa.array(["1", "0", None]).dictionary_encode(),
            pa.array([1, 0, None], pa.int8()),
            pa.array([1, 0, None], pa.float16()),
        ],
    )
    def test_reads_one_zero_and_unknown_however_they_are_written(
        self, tmp_path: Path, column: Any
    ) -> None:
        path = write_parquet(tmp_path / "l.parquet", {"scan_id": ["a", "b", "c"], "mass": column})
        np.testing.assert_array_equal(read_labels(path).y, np.array([[1], [0], [NAN]], np.float32))

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_reads_csv_with_any_usual_delimiter_and_a_byte_order_mark(
        self, tmp_path: Path, delimiter: str
    ) -> None:
        text = "\ufeffscan_id,mass,edema\n007,1,\n008,0,1.0\n".replace(",", delimiter)
        table = read_labels(write_csv(tmp_path / "l.csv", text))
        assert table.ids == ("007", "008")
        assert table.findings == ("mass", "edema")
        np.testing.assert_array_equal(table.y, np.array([[1, NAN], [0, 1]], np.float32))

    def test_integer_ids_of_a_parquet_file_are_text(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "l.parquet", {"study_id": [12, 7], "mass": [0, 1]})
        assert read_labels(path).ids == ("12", "7")

    def test_a_finding_without_any_label_is_all_unknown(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "l.parquet", {"scan_id": ["a", "b"], "mass": [None, None]})
        assert np.isnan(read_labels(path).y).all()

    def test_joins_on_the_finest_id_and_takes_no_id_for_a_finding(self, tmp_path: Path) -> None:
        text = "patient_id,mass,study_id,split\nP,1,S1,train\nP,0,S2,train\n"
        table = read_labels(write_csv(tmp_path / "l.csv", text))
        assert (table.id_column, table.ids, table.findings) == ("study_id", ("S1", "S2"), ("mass",))

    @pytest.mark.parametrize(
        ("typed", "name"),
        [
            ("StudyInstanceUID", "study_id"),
            ("Study_ID", "study_id"),
            ("PatientID", "patient_id"),
            ("SeriesInstanceUID", "scan_id"),
        ],
    )
    def test_ids_may_be_named_as_in_dicom(self, tmp_path: Path, typed: str, name: str) -> None:
        table = read_labels(write_csv(tmp_path / "l.csv", f"{typed},mass\nx,1\n"))
        assert (table.id_column, table.findings) == (name, ("mass",))

    def test_the_user_chooses_findings_and_their_order(self, tmp_path: Path) -> None:
        text = "scan_id,age,mass,edema,report\na,61,1,0,no words\n"
        path = write_csv(tmp_path / "l.csv", text)
        table = read_labels(path, findings=("edema", "mass"))
        assert table.findings == ("edema", "mass")
        assert table.y.tolist() == [[0.0, 1.0]]

    def test_lines_of_one_id_complete_each_other(self, tmp_path: Path) -> None:
        text = "scan_id,mass,edema,split\na,1,,\nb,0,0,test\na,1,0,dev\n"
        table = read_labels(write_csv(tmp_path / "l.csv", text))
        assert table.ids == ("a", "b")
        assert table.y.tolist() == [[1, 0], [0, 0]]
        assert table.split is not None
        assert table.split.tolist() == ["validation", "test"]

    def test_the_index_that_pandas_leaves_in_parquet_is_no_finding(self, tmp_path: Path) -> None:
        columns = {"scan_id": ["a"], "mass": [1], "__index_level_0__": [17]}
        table = read_labels(write_parquet(tmp_path / "l.parquet", columns))
        assert table.findings == ("mass",)


class TestDigest:
    def test_is_that_of_the_content_not_of_the_file(self, tmp_path: Path) -> None:
        csv = write_csv(tmp_path / "l.csv", "scan_id,mass,edema\nb,0,1\na,1,\n")
        columns = {"scan_id": ["a", "b"], "mass": [1.0, 0.0], "edema": [NAN, 1.0]}
        parquet = write_parquet(tmp_path / "l.parquet", columns)
        assert read_labels(csv).digest == read_labels(parquet).digest

    @pytest.mark.parametrize(
        "text",
        [
            "scan_id,mass,edema\nb,0,1\na,1,0\n",
            "scan_id,mass,edema\nb,0,1\nc,1,\n",
            "scan_id,mass,oedema\nb,0,1\na,1,\n",
            "study_id,mass,edema\nb,0,1\na,1,\n",
            "scan_id,mass,edema,split\nb,0,1,train\na,1,,test\n",
        ],
    )
    def test_differs_when_anything_differs(self, tmp_path: Path, text: str) -> None:
        one = write_csv(tmp_path / "l.csv", "scan_id,mass,edema\nb,0,1\na,1,\n")
        other = write_csv(tmp_path / "m.csv", text)
        assert read_labels(one).digest != read_labels(other).digest

    @pytest.mark.parametrize(
        ("text", "digest"),
        [
            (
                "scan_id,mass,edema\nb,0,1\na,1,\n",
                "eaf136f1c0f99f5ac12ddbc44b3b1fa922caa7289e232c413ecd4c3d516da96a",
            ),
            (
                "StudyInstanceUID;patient_id;mass;split\n1.2;p;1.0;val\n1.3;;TRUE;Training\n"
                "1.3;q;na;\n",
                "2cb3ed5c2b46934acd6f0c7494abee8c004862008ed033d171353a1bee449c1c",
            ),
        ],
    )
    def test_is_that_of_version_0_1(self, tmp_path: Path, text: str, digest: str) -> None:
        assert read_labels(write_csv(tmp_path / "l.csv", text)).digest == digest

    def test_is_another_if_ids_are_repaired(self, tmp_path: Path) -> None:
        path = write_csv(tmp_path / "l.csv", "scan_id,mass\n1,1\n")
        repaired = read_labels(path, rules=LabelRules(id_repair="pad4"))
        assert repaired.digest != read_labels(path).digest


class TestRefuses:
    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("accession,mass\n1,1\n", r"no id column: it needs scan_id.*'accession', 'mass'"),
            ("scan_id,split\na,train\n", "no finding"),
            ("scan_id,mass\na,1\nb,2\nc,3\n", r"no finding.*'mass' holds 2, 3 beside 1 labels"),
            (f"scan_id,mass\n{ROWS}x,2\n", r"column 'mass' holds 2 in row 21: .*--ignore 'mass'"),
            (f"scan_id,mass\n{ROWS}x,0.5\n", r"column 'mass' holds 0\.5 in row 21"),
            (f"scan_id,mass\n{ROWS}x,1?\ny,?1\n", r"column 'mass' holds text in rows 21, 22"),
            ("scan_id,mass\na,1\nb,-1\n", r"-1 and no 0 is in 'mass': say what -1 means"),
            (f"scan_id,mass\n{ROWS}x,-\n", r"holds text and - \(negative or unknown\?\) in row 21"),
            ("scan_id,mass\na,1\n,0\n", "row 2 has no scan_id"),
            ("scan_id,mass\na,1\nb,0\na,0\n", r"rows 1, 3, which contradict"),
            ("scan_id,mass,split\na,1,train\na,1,test\n", r"rows 1, 2, which contradict"),
            ("scan_id,mass,split\na,1,train\nb,1,hold-out\n", r"no name of a split in row 2"),
            ("scan_id,mass,mass\na,1,0\n", "more than one column is named 'mass'"),
            ("scan_id,mass\na,1,0\n", "cannot read labels"),
            ("", "cannot read labels"),
            ("scan_id,mass\n", "has no row"),
            ("study_id,StudyInstanceUID,m\n1,1,1\n", "more than one column 'study_id': 'study_id'"),
            ('scan_id,mass\na,1\nb,"0\nc,1\n', "a quote is too many, or one is not closed"),
            ("scan_id,mass\na,1\nb\n", "row 2: expected 2 columns, got 1"),
            ("AccessionNumber,mass\n1,1\n", "name a visit of a patient.*StudyInstanceUID"),
            ("scan_id,mass\n1.2E+15,1\n1.3E+15,0\n", r"scan_id in row 1 \(and 1 more\) is a round"),
        ],
    )
    def test_a_table_that_is_wrong(self, tmp_path: Path, text: str, sentence: str) -> None:
        with pytest.raises(LabelError, match=sentence):
            read_labels(write_csv(tmp_path / "l.csv", text))

    def test_an_unknown_finding_with_those_that_are_near(self, tmp_path: Path) -> None:
        path = write_csv(tmp_path / "l.csv", "scan_id,midline_shift,mass_effect\na,1,0\n")
        with pytest.raises(LabelError, match=r"'midline_shif': did you mean 'midline_shift'\?"):
            read_labels(path, findings=["mass_effect", "midline_shif"])
        with pytest.raises(LabelError, match="'xyz': it has 'scan_id', 'midline_shift', 'mass_eff"):
            read_labels(path, findings=["xyz"])

    def test_ids_that_lost_digits_as_decimal_numbers(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "l.parquet", {"study_id": [1e17, 2e17], "mass": [0, 1]})
        with pytest.raises(LabelError, match="rounded decimal number"):
            read_labels(path)

    @pytest.mark.parametrize("name", ["scan_id", "mass", "split"])
    @pytest.mark.parametrize("values", [[["1"], ["2"]], [{"a": 1}, {"a": 2}], [b"\xff", b"1"]])
    def test_a_column_that_holds_no_plain_values(
        self, tmp_path: Path, name: str, values: list[object]
    ) -> None:
        columns = {"scan_id": ["a", "b"], "mass": [1, 0], "split": ["train", "test"], name: values}
        path = write_parquet(tmp_path / "l.parquet", columns)
        other = pq.read_table(path).append_column("edema", [[1, 0]])
        pq.write_table(other, path)
        if name == "mass":
            assert read_labels(path).findings == ("edema",)
        with pytest.raises(LabelError, match=f"{name!r} holds .* one (number|text|word)"):
            read_labels(path, findings=["mass", "edema"])

    @pytest.mark.parametrize("name", ["none.csv", "none.parquet"])
    def test_a_file_that_is_not_there_or_not_readable(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(LabelError, match=f"no label table is at .*{name}: name a .csv, .xlsx"):
            read_labels(tmp_path / name)
        (tmp_path / name).write_bytes(b"PAR1\xff\xfe\x00PAR1")
        with pytest.raises(LabelError, match="cannot read labels"):
            read_labels(tmp_path / name)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("study_id,mass\n1.2.826.7,DOE^JANE\n", "'mass' holds text"),
            ("study_id,born\n1.2.826.7,19440506\n", "'born' holds large numbers"),
            ("study_id,born\n1.2.826.7,06.05.1944\n", "'born' holds dates"),
            (f"study_id,mass\n{ROWS}1.2.826.7,DOE^JANE\n", "'mass' holds text in row 21"),
            ("study_id,m,split\n1.2.826.7,1,DOE^JANE\n", "no name of a split in row 1"),
            ("study_id,mass\nx,1\n1.2.826.7,1,DOE^JANE,19440506\n", "row 2: .* 2 columns, got 4"),
            ('study_id,mass\nx,"1\n1.2.826.7,0\nDOE^JANE,1\n', "is not closed"),
            ("study_id,mass\n1.2.826.7,1\n1.2.826.7,0\n", "rows 1, 2, which contradict"),
            ("study_id,mass\n1.2.826.7,1\n", "no study_id of .* is one of the scans'"),
        ],
    )
    def test_no_table_with_words_that_name_a_patient(
        self, tmp_path: Path, text: str, sentence: str
    ) -> None:
        with pytest.raises(LabelError, match=sentence) as refused:
            join(tmp_path, text)
        assert not [one for one in ("1.2.826", "DOE", "19440506") if one in str(refused.value)]

    def test_all_that_is_wrong_at_once(self, tmp_path: Path) -> None:
        rows = [f"s{i},1,no," for i in range(20)]
        rows += [",1,yes,", "x,1?,no,train", "y,0,ja?,fold 1", "y,1,no,"]
        text = "\n".join(["study_id,mass,edema,split", *rows])
        with pytest.raises(LabelError, match="5 things to mend") as refused:
            read_labels(write_csv(tmp_path / "l.csv", text))
        lines = str(refused.value).splitlines()[1:]
        for line, said in zip(
            lines,
            (
                "'split' is no name of a split in row 23",
                "'mass' holds text in row 22",
                "'edema' holds text in row 23",
                "row 21 has no study_id",
                "rows 23, 24, which contradict",
            ),
            strict=True,
        ):
            assert said in line


class TestWaysToJoin:
    """What was done to ids on their way is found and told, and undone if asked."""

    ORIGINALS = tuple(f"{i:06d}" for i in range(1, 13))

    def scans(self, key: bytes | None, originals: Sequence[str] = ORIGINALS) -> pa.Table:
        make = Pseudonyms(key)
        return pa.table(
            {
                "scan_id": [make.scan(f"{one}.1") for one in originals],
                "study_id": [make.study(one) for one in originals],
                "patient_id": [make.patient(f"sub-{one}") for one in originals],
            }
        )

    def table(self, tmp_path: Path, ids: Sequence[str], **rules: str) -> LabelTable:
        rows = "".join(f"{one},{i % 2}\n" for i, one in enumerate(ids))
        path = write_csv(tmp_path / "l.csv", f"study_id,mass\n{rows}")
        return read_labels(path, rules=LabelRules(**rules))  # type: ignore[arg-type]

    @pytest.mark.parametrize("key", [None, KEY])
    @pytest.mark.parametrize(
        ("spoil", "repair"),
        [
            (lambda one: one.lstrip("0"), "pad6"),
            (lambda one: f"00{one}", "unpad"),
            (lambda one: f"/data/x/{one}.nii.gz", "stem"),
            (lambda one: f"{one}.dcm", "stem"),
            (lambda one: f"'{one}", "unquote"),
            (lambda one: f"{one[:3]}-{one[3:]}", "alnum"),
        ],
    )
    def test_a_repair_is_told_with_its_matches_and_done_on_request(
        self, tmp_path: Path, spoil: Callable[[str], str], repair: str, key: bytes | None
    ) -> None:
        originals = self.ORIGINALS
        if repair == "unpad":
            originals = tuple(one.lstrip("0") for one in originals)
        scans, ids = self.scans(key, originals), [spoil(one) for one in self.ORIGINALS]
        with pytest.raises(LabelError, match=f"would match 12 ids if .*--id-repair {repair}"):
            join_labels(self.table(tmp_path, ids), scans, key=key)
        joined = join_labels(self.table(tmp_path, ids, id_repair=repair), scans, key=key)
        assert joined.matched.all()
        assert joined.repaired == 12
        assert joined.y[:, 0].tolist() == [0, 1] * 6

    def test_a_way_is_told_where_only_some_match(self, tmp_path: Path) -> None:
        ids = [*self.ORIGINALS[:4], *(one.lstrip("0") for one in self.ORIGINALS[4:]), "x"]
        table = self.table(tmp_path, ids)
        assert join_labels(table, self.scans(KEY), key=KEY).matched.sum() == 4
        (way,) = ways_to_join(table, self.scans(KEY), key=KEY)
        assert way == "would match 8 ids if padded with zeros to 6 digits: --id-repair pad6"

    def test_ids_of_another_kind_are_told(self, tmp_path: Path) -> None:
        ids = [f"sub-{one}" for one in self.ORIGINALS]
        with pytest.raises(
            LabelError, match="12 ids as those of patients: --id-column 'study_id'=pa"
        ):
            join_labels(self.table(tmp_path, ids), self.scans(KEY), key=KEY)
        table = self.table(tmp_path, ids, id_column="study_id=patient_id")
        assert join_labels(table, self.scans(KEY), key=KEY).matched.all()

    def test_a_whole_number_is_the_same_with_a_decimal_point(self, tmp_path: Path) -> None:
        originals = [str(100 + i) for i in range(12)]
        joined = join_labels(
            self.table(tmp_path, [f"{one}.0" for one in originals]),
            self.scans(KEY, originals),
            key=KEY,
        )
        assert joined.matched.all()
        assert joined.repaired == 12

    def test_a_repair_that_makes_two_patients_one_is_refused(self, tmp_path: Path) -> None:
        table = self.table(tmp_path, ["000001", "x", "1"], id_repair="pad6")
        assert join_labels(table, self.scans(KEY), key=KEY).repaired == 1
        table = self.table(tmp_path, ["000001", "1"], id_repair="pad6")
        with pytest.raises(LabelError, match="rows 1, 2, which contradict"):
            join_labels(table, self.scans(KEY), key=KEY)

    def test_an_unknown_repair_is_refused_with_those_there_are(self, tmp_path: Path) -> None:
        table = self.table(tmp_path, self.ORIGINALS, id_repair="trim")
        with pytest.raises(ConfigError, match=r"padN .*unpad, stem.* got 'trim'"):
            join_labels(table, self.scans(KEY), key=KEY)


class TestJoin:
    def test_gives_one_line_a_scan_in_the_order_of_the_scans(self, tmp_path: Path) -> None:
        joined = join(tmp_path, "scan_id,mass,edema\nc3,1,0\nc9,1,1\nc1,,1\n")
        expected = [[NAN, NAN], [NAN, 1], [NAN, NAN], [1, 0]]
        np.testing.assert_array_equal(joined.y, np.array(expected, np.float32))
        assert joined.matched.tolist() == [False, True, False, True]
        assert joined.scan_ids == ("c0", "c1", "c2", "c3")
        assert joined.patient_ids == ("p0", "p0", "p0", "p1")
        assert joined.split is None

    def test_counts_unmatched_ids_of_both_sides_and_shows_scans_and_rows(
        self, tmp_path: Path
    ) -> None:
        text = "scan_id,mass\nc3,1\n" + "".join(f"x{i},0\n" for i in range(5))
        joined = join(tmp_path, text)
        assert (joined.unmatched_scans.count, joined.unmatched_scans.examples) == (
            3,
            ("c0", "c1", "c2"),
        )
        assert (joined.unmatched_labels.count, joined.unmatched_labels.examples) == (
            5,
            ("row 2", "row 3", "row 4"),
        )

    def test_a_study_gives_its_labels_to_all_its_scans(self, tmp_path: Path) -> None:
        joined = join(tmp_path, "study_id,mass,split\ns0,1,train\ns1,0,train\n")
        assert joined.y[:, 0].tolist() == [1, 1, 0, 0]
        assert joined.unmatched_scans.count == 0

    def test_a_split_is_empty_where_the_table_gives_none(self, tmp_path: Path) -> None:
        joined = join(tmp_path, "scan_id,mass,split\nc0,1,val\nc2,0,\nc3,0,Test\n")
        assert joined.split is not None
        assert joined.split.tolist() == ["validation", "", "", "test"]

    @pytest.mark.parametrize("kind", ["scan", "study", "patient"])
    def test_original_ids_match_through_the_key(self, tmp_path: Path, kind: str) -> None:
        make = getattr(Pseudonyms(KEY), kind)
        columns = {f"{name}_id": ["u", "v", "w"] for name in ("scan", "study", "patient")}
        columns[f"{kind}_id"] = [make("1.2.840"), make("1.2.841"), "kept"]
        path = write_csv(tmp_path / "l.csv", f"{kind}_id,mass\nkept,0\n1.2.841,1\n")
        joined = join_labels(read_labels(path), pa.table(columns), key=KEY)
        np.testing.assert_array_equal(joined.y[:, 0], np.array([NAN, 1, 0], np.float32))
        assert joined.unmatched_labels.count == 0

    def test_an_original_id_and_its_pseudonym_must_not_contradict(self, tmp_path: Path) -> None:
        pseudonym = Pseudonyms(KEY).scan("1.2")
        path = write_csv(tmp_path / "l.csv", f"scan_id,mass\n1.2,1\n{pseudonym},0\n")
        table = pa.table({"scan_id": [pseudonym], "study_id": ["s"], "patient_id": ["p"]})
        with pytest.raises(LabelError, match="contradict"):
            join_labels(read_labels(path), table, key=KEY)

    def test_refuses_when_nothing_matches_and_shows_the_scans(self, tmp_path: Path) -> None:
        with pytest.raises(LabelError) as refused:
            join(tmp_path, "scan_id,mass\n1.2.840,1\n")
        assert "(1 ids) is one of the scans', which have 'c0', 'c1', 'c2' and 1 more" in str(
            refused.value
        )
        assert "key of the pseudonyms" in str(refused.value)

    def test_refuses_a_patient_in_two_splits(self, tmp_path: Path) -> None:
        with pytest.raises(LabelError, match=r"1 of 2 patients .* 'p0' in test and train"):
            join(tmp_path, "scan_id,mass,split\nc0,1,train\nc1,0,\nc2,0,test\nc3,1,test\n")

    @pytest.mark.parametrize("key", [None, KEY])
    def test_a_patient_that_the_table_knows_better_is_one(
        self, tmp_path: Path, key: bytes | None
    ) -> None:
        """c0 to c2 are of p0, c3 of p1 in the scans; the table gives c2 and c3 to one patient."""
        text = "scan_id,patient_id,f\nc0,,1\nc2,Erika,0\nc3,Erika,1\n"
        joined = join(tmp_path, text, key=key)
        assert len(set(joined.patient_ids)) == 1
        assert joined.known_patients == 2
        expected = "p0" if key is None else Pseudonyms(key).patient("Erika")
        assert set(joined.patient_ids) == {expected}

    def test_a_patient_that_the_table_alone_tears_stays_one(self, tmp_path: Path) -> None:
        joined = join(tmp_path, "scan_id,patient_id,f\nc0,x,1\nc1,y,0\nc3,z,1\n")
        assert joined.patient_ids == ("p0", "p0", "p0", "p1")

    def test_patients_are_those_of_the_scans_where_the_table_names_the_same(
        self, tmp_path: Path
    ) -> None:
        joined = join(tmp_path, "scan_id,patient_id,f\nc0,p0,1\nc3,p1,0\n")
        assert joined.patient_ids == ("p0", "p0", "p0", "p1")

    def test_refuses_a_split_that_tears_a_patient_of_the_table(self, tmp_path: Path) -> None:
        text = "scan_id,patient_id,f,split\nc2,Erika,0,train\nc3,Erika,1,test\n"
        with pytest.raises(LabelError, match="1 of 1 patients are in more than one split"):
            join(tmp_path, text)

    def test_refuses_a_scan_of_two_patients_without_naming_them(self, tmp_path: Path) -> None:
        with pytest.raises(LabelError, match="row 2 has another patient_id") as refused:
            join(tmp_path, "scan_id,patient_id,f\nc2,Erika,0\nc2,Max,\n")
        assert "Max" not in str(refused.value)
        assert "Erika" not in str(refused.value)

    def test_one_row_of_a_scan_may_name_the_patient_and_another_not(self, tmp_path: Path) -> None:
        for rows in ("c2,Erika,0\nc2,,\n", "c2,,0\nc2,Erika,\n"):
            joined = join(tmp_path, f"scan_id,patient_id,f\n{rows}c3,Erika,1\n")
            assert len(set(joined.patient_ids)) == 1

    def test_the_patients_of_a_table_are_part_of_what_it_says(self, tmp_path: Path) -> None:
        tables = [
            read_labels(write_csv(tmp_path / "labels.csv", text))
            for text in ("scan_id,f\nc2,0\n", "scan_id,patient_id,f\nc2,a,0\n")
        ]
        assert tables[0].digest != tables[1].digest

    def test_keeps_every_label_of_a_wide_table_in_place(self, tmp_path: Path) -> None:
        n, c = 3000, 75
        ids = [f"c{i}" for i in range(n)]
        labels = np.random.default_rng(0).integers(0, 2, (n, c))
        columns = {"scan_id": ids, **{f"finding_{k}": labels[:, k] for k in range(c)}}
        table = read_labels(write_parquet(tmp_path / "l.parquet", columns))
        joined = join_labels(table, scans(n))
        np.testing.assert_array_equal(joined.y, labels)
