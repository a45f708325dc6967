"""Which column is what, by whose words, and why."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctfm.store.errors import ConfigError, LabelError
from ctfm.store.label_rules import LabelRules
from ctfm.store.label_words import Words, plain
from ctfm.store.labels import LabelTable, inspect_labels, read_labels

NAN = float("nan")


def table(folder: Path, columns: dict[str, list[str]], **rules: Any) -> LabelTable:
    return read_labels(write(folder, columns), rules=LabelRules(**rules))


def write(folder: Path, columns: dict[str, list[str]]) -> Path:
    """A CSV with those columns beside the ids."""
    n = len(next(iter(columns.values())))
    every = {"study_id": [f"s{i}" for i in range(n)], **columns}
    lines = [list(every), *zip(*every.values(), strict=True)]
    text = "\n".join(";".join(f'"{cell}"' for cell in line) for line in lines)
    (folder / "l.csv").write_text(text)
    return folder / "l.csv"


def roles(folder: Path, columns: dict[str, list[str]], **rules: Any) -> dict[str, tuple[str, str]]:
    report = inspect_labels(write(folder, columns), LabelRules(**rules))
    return {use.name: (use.role, use.why) for use in report.columns}


class TestWords:
    @pytest.mark.parametrize(
        ("positive", "negative"),
        [
            ("Yes", "No"),
            ("Y", "n"),
            ("positive", "NEGATIVE"),
            ("pos", "neg"),
            ("present", "Absent"),
            ("Ja", "nein"),
            ("vorhanden", "nicht vorhanden"),
            ("oui", "non"),
            ("sí", "no"),
            ("présent", "absent"),
            ("1,0", "0,0"),
            ("1.00", "0.00"),
            ("TRUE", "FALSE"),
            ("+", "-"),
            ("+", "\u2212"),
            (" yes ", " no "),
        ],
    )
    def test_of_a_pair_mean_one_and_zero(
        self, tmp_path: Path, positive: str, negative: str
    ) -> None:
        found = table(tmp_path, {"mass": [positive, negative, ""]})
        np.testing.assert_array_equal(found.y[:, 0], np.array([1, 0, NAN], np.float32))

    @pytest.mark.parametrize("word", ["NA", "n/a", "?", ".", "unk", "-1", "-1.0", "#N/A", "unklar"])
    def test_of_doubt_mean_unknown_and_are_told(self, tmp_path: Path, word: str) -> None:
        columns = {"mass": ["1", "0", word]}
        found = table(tmp_path, columns)
        np.testing.assert_array_equal(found.y[:, 0], np.array([1, 0, NAN], np.float32))
        assert roles(tmp_path, columns)["mass"][1].endswith(f"{plain(word)}: unknown")

    def test_of_the_user_come_first(self, tmp_path: Path) -> None:
        columns = {"mass": ["1", "0", "-1", "likely", ""]}
        given = {"positive": ("-1", "likely"), "negative": ("blank",)}
        assert table(tmp_path, columns, **given).y[:, 0].tolist() == [1, 0, 1, 1, 0]
        assert np.isnan(table(tmp_path, columns, uncertain=("likely",)).y[2:, 0]).all()

    def test_codes_of_the_user_are_the_only_ones(self, tmp_path: Path) -> None:
        """In a table of 1 for yes and 2 for no, 0 is neither: it may be "not examined"."""
        spss = {"mass": ["1", "2", "2"], "edema": ["yes", "no", "9"]}
        given = {"positive": ("1",), "negative": ("2",), "uncertain": ("9",)}
        found = table(tmp_path, spss, **given)
        np.testing.assert_array_equal(found.y, np.array([[1, 1], [0, 0], [0, NAN]], np.float32))
        with_zero = {"mass": [*"12" * 10, "0"]}
        with pytest.raises(LabelError, match="'mass' holds 0 in row 21"):
            table(tmp_path, with_zero, **given)
        turned = table(tmp_path, {"mass": ["1", "0"]}, positive=("0",), negative=("1",))
        assert turned.y[:, 0].tolist() == [0, 1]

    def test_that_are_given_two_meanings_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="'yes' is given as two"):
            Words.given(["Yes"], ["yes "], [])

    @pytest.mark.parametrize("text", ["1,000", "detected", "1?", "-", "2", "inf", "x", "1 / 0"])
    def test_that_may_mean_two_things_mean_nothing(self, text: str) -> None:
        assert Words.given([], [], []).meaning(text) is None

    def test_minus_one_without_zero_is_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(LabelError, match="-1 and no 0 is in 'mass'"):
            table(tmp_path, {"mass": ["1", "-1"]})
        # CheXpert's columns of rare findings, beside one that says what -1 is.
        found = table(tmp_path, {"mass": ["1", "-1"], "edema": ["0", "-1"]})
        np.testing.assert_array_equal(found.y, np.array([[1, 0], [NAN, NAN]], np.float32))
        assert table(tmp_path, {"m": ["1", "-1"]}, negative=("-1",)).y[:, 0].tolist() == [1, 0]
        assert np.isnan(table(tmp_path, {"m": ["1", "-1"]}, uncertain=("-1",)).y[1, 0])


class TestColumns:
    def test_that_are_no_findings_are_left_out_with_the_reason(self, tmp_path: Path) -> None:
        columns = {
            "mass": ["1", "0", "1"],
            "report": ["normal", "bleeding, left", "yes"],
            "born": ["1944-05-06", "01.02.1950", "3/4/1951"],
            "age": ["61", "62.5", "70"],
            "Sex": ["0", "1", "1"],
            "Fazekas": ["1", "2", "3"],
            "fold": ["0", "1", "1"],
            "Unnamed: 0": ["0", "1", "1"],
            "Exclude": ["0", "0", "1"],
            "Accession Number": ["1", "0", "1"],
            "mrn": ["1234567", "1234568", "1234569"],
        }
        found = roles(tmp_path, columns)
        assert [name for name, (role, _) in found.items() if role == "finding"] == ["mass"]
        reasons = {name: why for name, (role, why) in found.items() if role == "ignored"}
        assert reasons == {
            "report": "holds text beside 1 labels",
            "born": "holds dates",
            "age": "holds 61, 62.5, 70",
            "Sex": "a trait of the patient by its name",
            "Fazekas": "holds 2, 3 beside 1 labels",
            "fold": "a number of the row or a date, by its name",
            "Unnamed: 0": "has no name",
            "Exclude": "which rows to use, by its name: remove the other rows, or leave their "
            "split empty",
            "Accession Number": "accession numbers join nothing: no catalogue holds them",
            "mrn": "holds large numbers",
        }

    def test_that_are_asked_for_by_name_are_findings(self, tmp_path: Path) -> None:
        columns = {"mass": ["1", "0"], "sex": ["0", "1"]}
        found = table(tmp_path, columns, findings=("sex",))
        assert (found.findings, found.y.tolist()) == (("sex",), [[0], [1]])
        with pytest.raises(LabelError, match="'grade' holds 3 in row 2"):
            table(tmp_path, {"grade": ["1", "3"]}, findings=("grade",))

    def test_with_one_odd_cell_are_no_text_but_a_fault(self, tmp_path: Path) -> None:
        columns = {"mass": ["1", "0"] * 10, "edema": [*["0"] * 19, "1?"]}
        with pytest.raises(LabelError, match="'edema' holds text in row 20: a finding is") as error:
            table(tmp_path, columns)
        assert "1?" not in str(error.value)
        assert table(tmp_path, columns, ignore=("edema",)).findings == ("mass",)
        assert np.isnan(table(tmp_path, columns, uncertain=("1?",)).y[19, 1])

    def test_may_have_a_comma_or_an_accent_in_their_name(self, tmp_path: Path) -> None:
        columns = {"Hämatom, subdural": ["1", "0"], "mass": ["0", "1"]}
        decomposed = "Ha\u0308matom, subdural"
        assert table(tmp_path, columns, findings=(decomposed,)).y.tolist() == [[1], [0]]
        with pytest.raises(LabelError, match=r"""did you mean .*'"Hämatom, subdural"'"""):
            table(tmp_path, columns, findings=("Hämatom", "mass"))

    def test_named_twice_are_refused_only_if_they_are_findings(self, tmp_path: Path) -> None:
        path = tmp_path / "l.csv"
        path.write_text("study_id,mass,note,note\na,1,p,q\nb,0,p,q\n")
        assert read_labels(path).findings == ("mass",)
        path.write_text("study_id,mass,mass\na,1,0\nb,0,1\n")
        with pytest.raises(LabelError, match="more than one column is named 'mass'"):
            read_labels(path)

    @pytest.mark.parametrize("rule", ["findings", "ignore"])
    def test_that_are_not_there_are_told_with_those_that_are_near(
        self, tmp_path: Path, rule: str
    ) -> None:
        with pytest.raises(LabelError, match=f"'Mass': did you mean 'mass'.*--{rule}"):
            table(tmp_path, {"mass": ["1", "0"]}, **{rule: ("Mass",)})


class TestIds:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("participant_id", "patient_id"),
            ("Subject ID", "patient_id"),
            ("StudyUID", "study_id"),
            ("series_uid", "scan_id"),
        ],
    )
    def test_are_known_by_their_usual_names(self, tmp_path: Path, name: str, kind: str) -> None:
        (tmp_path / "l.csv").write_text(f"{name},mass\na,1\nb,0\n")
        assert read_labels(tmp_path / "l.csv").id_column == kind

    def test_may_be_in_any_column_that_the_user_names(self, tmp_path: Path) -> None:
        columns = {"file": ["a", "b"], "mass": ["1", "0"]}
        found = table(tmp_path, columns, id_column="file=scan_id")
        assert (found.id_column, found.ids, found.findings) == ("scan_id", ("a", "b"), ("mass",))
        with pytest.raises(LabelError, match="--id-column 'file'=KIND, where KIND is one of scan"):
            table(tmp_path, columns, id_column="file")

    def test_of_two_columns_are_chosen_by_the_user(self, tmp_path: Path) -> None:
        columns = {"StudyInstanceUID": ["1.2", "1.3"], "mass": ["1", "0"]}
        with pytest.raises(LabelError, match=r"'study_id' and 'StudyInstanceUID'.*--id-column"):
            table(tmp_path, columns)
        assert table(tmp_path, columns, id_column="StudyInstanceUID").ids == ("1.2", "1.3")
        assert table(tmp_path, columns, ignore=("study_id",)).ids == ("1.2", "1.3")

    def test_that_are_missing_are_so_whatever_the_word(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("study_id,mass\na,1\nNA,0\n,1\nnan,0\n")
        with pytest.raises(LabelError, match="rows 2, 3, 4 have no study_id"):
            read_labels(tmp_path / "l.csv")


class TestSplit:
    @pytest.mark.parametrize("name", ["split", "Split", "SET", "data_split", "subset"])
    @pytest.mark.parametrize(
        "words", [["train", "val", "test"], ["Training set", "Dev", "test-set"]]
    )
    def test_is_known_by_name_and_words(self, tmp_path: Path, name: str, words: list[str]) -> None:
        found = table(tmp_path, {"mass": ["1", "0", "1"], name: words})
        assert found.split is not None
        assert found.split.tolist() == ["train", "validation", "test"]
        assert found.findings == ("mass",)

    def test_is_not_a_set_of_something_else(self, tmp_path: Path) -> None:
        found = table(tmp_path, {"mass": ["1", "0"], "set": ["A", "B"]})
        assert found.split is None
        columns = {"mass": ["1", "0"], "set": ["A", "B"], "Split": ["dev", ""]}
        assert table(tmp_path, columns).split is not None

    def test_is_asked_for_where_there_are_two(self, tmp_path: Path) -> None:
        columns = {"mass": ["1", "0"], "set": ["train", "test"], "subset": ["test", "train"]}
        with pytest.raises(LabelError, match="'set' and 'subset' could both be the split"):
            table(tmp_path, columns)
        split = table(tmp_path, columns, ignore=("set",)).split
        assert split is not None
        assert split.tolist() == ["test", "train"]


class TestRules:
    def test_of_the_file_beside_a_table_are_followed(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"a, b": ["2", "1"], "mass": ["2", "9"], "note": ["x", "y"]})
        (tmp_path / "l.toml").write_text(
            'findings = ["mass", "a, b"]\npositive = [2]\nnegative = ["1"]\nuncertain = 9\n'
        )
        found = read_labels(path)
        assert found.findings == ("mass", "a, b")
        np.testing.assert_array_equal(found.y, np.array([[1, 1], [NAN, 0]], np.float32))
        assert read_labels(path, findings=["a, b"]).findings == ("a, b",)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("finding = ['a']", "holds 'finding', which is no rule"),
            ("findings = {a = 1}", "findings must be a list"),
            ("id_column = 3", "id_column must be one text"),
            ("positive = [true]", "positive must be a list"),
            ("findings = [", "is no TOML"),
        ],
    )
    def test_that_are_none_are_refused(self, tmp_path: Path, text: str, said: str) -> None:
        path = write(tmp_path, {"mass": ["1", "0"]})
        (tmp_path / "l.toml").write_text(text)
        with pytest.raises(LabelError, match=said):
            read_labels(path)
