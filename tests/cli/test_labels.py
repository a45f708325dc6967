"""`ctfm labels check` and what `fit-head` says of its labels, as a user types them."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ctfm

from ctfm.cli.options import names_of, parse_split
from ctfm.heads.runs import Run
from ctfm.store.catalogue import SCANS_SCHEMA, Catalogue
from ctfm.store.errors import ConfigError
from ctfm.store.pseudonyms import Pseudonyms

KEY = b"a key that nobody guesses"
SCANS, UNUSABLE = 40, 4
SECRETS = ("DOE^JANE", "Frau Müller", "19440506", "0000001", "1.2.826")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a catalogue of two studies each of 20 patients, 0000000 to 0000019."""
    make = Pseudonyms(KEY)
    lines = [
        {
            "scan_id": make.scan(f"1.2.826.{i}.1"),
            "study_id": make.study(f"1.2.826.{i}"),
            "patient_id": make.patient(f"{i // 2:07d}"),
            **{"usable": i >= UNUSABLE, "reason": "ok" if i >= UNUSABLE else "missing_slices"},
            **{"detail": "", "format": "dicom"},
        }
        for i in range(SCANS)
    ]
    files = {str(line["scan_id"]): ["/x"] for line in lines}
    table = pa.Table.from_pylist(lines, schema=SCANS_SCHEMA)
    Catalogue(scans=table, files=files, key=KEY).write(tmp_path / "scans.parquet")
    return tmp_path


def frame() -> pd.DataFrame:
    """A table as a hospital has it."""
    return pd.DataFrame(
        {
            "StudyInstanceUID": [f"1.2.826.{i}" for i in range(SCANS)],
            "Patient": ["DOE^JANE"] * SCANS,
            "born": ["19440506"] * SCANS,
            "Bericht": ["Frau Müller; unauffällig"] * SCANS,
            "sex": [i % 2 for i in range(SCANS)],
            "Hämatom, subdural": ["Ja" if i % 4 < 2 else "Nein" for i in range(SCANS)],
            "Shift": ["1,0" if i % 8 < 2 else "?" if i == 39 else "0,0" for i in range(SCANS)],
        }
    )


def said_of(printed: str, name: str) -> list[str]:
    """The words of the first line that begins with a name."""
    line = next(line for line in printed.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def test_check_says_what_each_column_is_what_joins_and_what_there_is_to_learn(site: Path) -> None:
    frame().to_csv(site / "l.csv", sep=";", encoding="utf-16", index=False)
    printed = ctfm("labels", "check", "l.csv", "--split", "stratified:50/25/25", cwd=site)
    assert "CSV (UTF-16, ';' between cells), 40 rows" in printed
    assert said_of(printed, "StudyInstanceUID") == ["id", "study_id"]
    assert said_of(printed, "Bericht") == ["ignored", "holds", "text"]
    assert said_of(printed, "sex")[:2] == ["ignored", "a"]
    assert "labels for 36 of 36 scans" in printed
    assert "that are not among these: 4 missing_slices" in printed
    assert said_of(printed, "(patients)") == ["10", "4", "4"]
    assert sum(map(int, said_of(printed, "(scans)"))) == SCANS - UNUSABLE
    lines = [line for line in printed.splitlines() if line.startswith("Hämatom, subdural")]
    assert lines[0].split()[2:] == ["finding", "ja:", "positive;", "nein:", "negative"]
    assert sum(map(int, lines[1].split()[2:5])) == 18
    assert "note: test has 4 patients" in printed
    assert "nothing to mend" in printed


def test_check_lists_everything_to_mend_at_once_and_names_nobody(site: Path) -> None:
    table = frame()
    table.loc[7, "Shift"] = "DOE^JANE"
    table["Split"] = ["train", "val", "test", "test"] * 10
    table.loc[3, "Split"] = "19440506"
    table.loc[9, "StudyInstanceUID"] = None
    table = pd.concat([table, table.iloc[[0]].assign(Shift="0,0")])
    table.to_excel(site / "l.xlsx", index=False)
    printed = ctfm("labels", "check", "l.xlsx", cwd=site, code=1)
    for problem in (
        "to mend: 5",
        "'Split' is no name of a split in row 4",
        "'Shift' holds text in row 8",
        "row 10 has no StudyInstanceUID",
        "StudyInstanceUID is the same in rows 1, 41, which contradict",
        "patients are in more than one split",
    ):
        assert problem in printed
    assert not [secret for secret in SECRETS if secret in printed]


def test_check_says_what_would_make_ids_join(site: Path) -> None:
    table = frame().rename(columns={"StudyInstanceUID": "PatientID"})
    table["PatientID"] = [i // 2 for i in range(SCANS)]
    table["Shift"] = [i // 2 % 2 for i in range(SCANS)]
    table["Hämatom, subdural"] = "ja"
    table.to_csv(site / "l.csv", index=False)
    printed = ctfm("labels", "check", "l.csv", cwd=site, code=1)
    assert "they would match 18 ids if padded with zeros to 7 digits: --id-repair pad7" in printed
    printed = ctfm("labels", "check", "l.csv", "--id-repair", "pad7", cwd=site)
    assert "labels for 36 of 36 scans" in printed
    (site / "l.toml").write_text('id_repair = "pad7"\nfindings = ["Shift"]\n')
    printed = ctfm("labels", "check", "l.csv", cwd=site)
    assert "rules of l.toml" in printed
    assert "labels for 36 of 36 scans" in printed
    assert not [secret for secret in SECRETS if secret in printed]


def test_check_needs_no_catalogue_to_look_at_a_table(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("AccessionNumber,m\x1b[2J\n17,1\n18,0\n")
    printed = ctfm("labels", "check", "l.csv", cwd=tmp_path, code=1)
    assert "without one (--scans) nothing is said of what joins" in printed
    assert "add a column of the StudyInstanceUID" in printed
    assert "\x1b[2J" not in printed
    assert "m\\x1b[2J" in printed


def test_a_name_with_a_comma_stands_in_quotes(site: Path) -> None:
    assert names_of('"a, b" , c', option="--x") == ["a, b", "c"]
    for wrong in ("", " ", "a,,b"):
        with pytest.raises(ConfigError, match="--x takes names"):
            names_of(wrong, option="--x")
    frame().to_csv(site / "l.csv", index=False)
    asked = ("--findings", '"Hämatom, subdural",sex')
    printed = ctfm("labels", "check", "l.csv", *asked, cwd=site)
    assert said_of(printed, "sex")[0] == "finding"
    assert said_of(printed, "Shift")[0] == "ignored"
    printed = ctfm("labels", "check", "l.csv", "--findings", "Hämatom, sex", cwd=site, code=1)
    assert "did you mean '\"Hämatom, subdural\"'" in printed


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("80/10/10", ("hash", (0.8, 0.1, 0.1))),
        ("stratified", ("stratified", (0.8, 0.1, 0.1))),
        ("Stratified:2/1/1", ("stratified", (0.5, 0.25, 0.25))),
    ],
)
def test_a_split_is_shares_or_stratified(text: str, parsed: object) -> None:
    assert parse_split(text) == parsed


QUICK = tuple(f"--set={setting}" for setting in ("max_epochs=1", "min_epochs=1", "min_positives=2"))


def test_fit_head_prints_what_it_learns_from_and_records_the_split(project: Path) -> None:
    labels = pq.read_table(project / "labels.parquet").to_pandas()
    labels["age"] = range(48)
    labels.to_csv(project / "l.csv", index=False)
    fit = ("fit-head", "--labels", "l.csv", "--experts", "0", "--out", "runs/one", *QUICK)
    stratified = ("--split", "stratified:50/25/25")
    said = ctfm(*fit, *stratified, cwd=project, code=1)
    assert "leave that column out (--ignore), or do not ask" in said
    said = ctfm(*fit, *stratified, "--ignore", "split", cwd=project)
    assert "split (asked for), age (holds 46 different numbers beside 2 labels)" in said
    assert said_of(said, "(patients)") == ["8", "4", "4"]
    assert [int(one) for one in said_of(said, "mass")[:3]] == [12, 6, 6]
    assert "1 of 1 findings choose the epoch" in said
    assert "test has 4 patients" in said
    config = Run.open(project / "runs" / "one").config
    assert (config.split_method, config.split_fractions) == ("stratified", (0.5, 0.25, 0.25))
    said = ctfm(*fit, "--split", "60/20/20", "--overwrite", cwd=project)
    assert "have a split of their own: --split is not used" in said
    assert Run.open(project / "runs" / "one").summary["scans"]["test"] == 12


def test_fit_head_prints_the_counts_of_each_fold(project: Path) -> None:
    fit = ("fit-head", "--experts", "0", "--out", "runs/folds", "--folds", "3", *QUICK)
    said = ctfm(*fit, "--split", "stratified", cwd=project)
    patients, scans = said_of(said, "(patients)"), said_of(said, "(scans)")
    assert sorted(map(int, patients)) == [5, 5, 6]
    assert sum(map(int, scans)) == 48
    assert Run.open(project / "runs" / "folds").config.split_method == "stratified"
