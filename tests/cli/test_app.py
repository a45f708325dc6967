"""The commands, as a user types them: the whole path in a project folder, and what goes wrong."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ctfm

from ctfm.heads.config import PRESETS, FitConfig
from ctfm.heads.runs import Run
from ctfm.store.catalogue import read_catalogue

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart.md"
SCANS = 60


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder in which the path was walked with the defaults, as typed."""
    folder = tmp_path_factory.mktemp("project")
    size = ("--matrix", "64", "--slices", "9", "--prevalence-floor", "0.3", "--workers", "0")
    ctfm("phantom", "--scans", str(SCANS), "--out", "cohort", *size, cwd=folder)
    ctfm("index", "cohort", "--workers", "1", cwd=folder)
    labels = pq.read_table(folder / "cohort" / "labels.parquet")
    pq.write_table(with_split(labels), folder / "labels.parquet")
    ctfm("extract", "--model", "intensity", "--workers", "0", cwd=folder)
    ctfm("fit-head", "--experts", "2", cwd=folder)
    return folder


def with_split(labels: pa.Table) -> pa.Table:
    """A quarter of the patients for validation and for test each.

    A hash split depends on the pseudonyms, and these on a key that is drawn anew every time: of so
    few patients it may leave too few for validation.
    """
    patients = labels["patient_id"].to_pylist()
    place = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    parts = ("train", "validation", "train", "test")
    return labels.append_column("split", pa.array([parts[place[one] % 4] for one in patients]))


RUN = "runs/intensity-molre2"


def test_labels_with_original_ids_join_pseudonymous_scans(project: Path) -> None:
    summary = json.loads((project / RUN / "summary.json").read_text())
    assert sum(summary["scans"].values()) == SCANS
    assert summary["command"][:2] == ["ctfm", "fit-head"]


def test_evaluate_prints_a_line_a_finding_and_the_macro_figures(project: Path) -> None:
    printed = ctfm("evaluate", RUN, cwd=project)
    assert "Subdural hematoma" in printed
    assert "SD across findings" in printed
    assert "clustered by patient" in printed


def test_evaluate_speaks_json(project: Path) -> None:
    values = json.loads(ctfm("evaluate", RUN, "--json", "--min-positives", "3", cwd=project))
    assert 0 <= values["macro_auc"] <= 1
    assert values["min_positives"] == 3
    assert len(values["findings"]) >= 12


def test_compare_prints_a_line_a_run(project: Path) -> None:
    printed = ctfm("compare", RUN, RUN, cwd=project)
    assert printed.count(RUN) == 4
    assert "+0.000…+0.000" in printed
    values = json.loads(ctfm("compare", RUN, RUN, "--json", cwd=project))
    assert [one["difference"] for one in values] == [0.0, 0.0]


def test_evaluate_prints_enrichment_where_lesions_are_known(project: Path) -> None:
    printed = ctfm("evaluate", RUN, "--lesions", "cohort/lesions.parquet", cwd=project)
    assert "median over findings" in printed


def test_predict_needs_nothing_but_the_run_and_the_scan(project: Path) -> None:
    scan = next(path for path in sorted((project / "cohort").iterdir()) if path.is_dir())
    values = json.loads(ctfm("predict", RUN, str(scan), "--json", cwd=project))
    assert len(values["findings"]) >= 12
    assert all(0 <= finding["probability"] <= 1 for finding in values["findings"])
    assert "mm below the vertex" in ctfm("predict", RUN, str(scan), cwd=project)


def test_predict_gives_what_the_run_recorded_for_the_same_scan(project: Path) -> None:
    catalogue = pq.read_table(project / "scans.private.parquet").to_pylist()
    lines = pq.read_table(project / RUN / "predictions.parquet").to_pylist()
    files = {line["scan_id"]: line["files"] for line in catalogue}
    for line in lines[:3]:
        folder = str(Path(files[line["scan_id"]][0]).parent)
        values = json.loads(ctfm("predict", RUN, folder, "--json", cwd=project))
        for finding in values["findings"]:
            recorded = line[f"logit_{finding['name']}"]
            assert finding["logit"] == pytest.approx(recorded, abs=2e-3)


def test_the_quickstart_in_python_does_what_the_commands_do(project: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", QUICKSTART.read_text(), flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert "macro AUC" in done.stdout, done.stderr
    assert Run.open(project / "runs" / "first").config == FitConfig(experts=6)


def test_report_is_one_page(project: Path) -> None:
    ctfm("report", RUN, cwd=project)
    assert "<html" in (project / RUN / "report.html").read_text()


def test_store_info_and_verify(project: Path) -> None:
    assert "fingerprint" in ctfm("store", "info", "features/intensity", cwd=project)
    assert "as it was written" in ctfm("store", "verify", "features/intensity", cwd=project)


def test_a_store_may_lie_on_object_storage(project: Path, bucket: str) -> None:
    few, url = f"{bucket}/features/few", f"{bucket}/features/intensity"
    catalogue = read_catalogue(project / "scans.parquet")
    replace(catalogue, scans=catalogue.scans[:3]).write(project / "few.parquet")
    scans = ("--scans", "few.parquet", "--workers", "0")
    ctfm("extract", "--model", "intensity", *scans, "--out", few, cwd=project)
    ctfm("store", "merge", few, "features/intensity", "--out", url, cwd=project)
    assert "fingerprint" in ctfm("store", "info", url, cwd=project)
    assert "as it was written" in ctfm("store", "verify", url, cwd=project)
    fit = ("--experts", "0", "--max-epochs", "2", "--min-epochs", "1", "--out", "runs/remote")
    assert "runs/remote" in ctfm("fit-head", "--features", url, *fit, cwd=project)


def test_stores_are_merged_and_exported(project: Path) -> None:
    printed = ctfm("store", "merge", "features/intensity", "--out", "merged/all", cwd=project)
    assert f"{SCANS} ok" in printed
    assert "as it was written" in ctfm("store", "verify", "merged/all", cwd=project)
    ctfm("store", "export", "merged/all", "--out", "rows.parquet", cwd=project)
    ids = set(pq.read_table(project / "rows.parquet", columns=["scan_id"])["scan_id"].to_pylist())
    assert len(ids) == SCANS
    again = ("export", "merged/all", "--format", "npy", "--out", "rows.parquet")
    assert "exists: choose another name" in ctfm("store", *again, cwd=project, code=1)


def test_a_damaged_store_is_repaired_with_scans_only_where_rows_are_lost(
    project: Path, tmp_path: Path
) -> None:
    catalogue = read_catalogue(project / "scans.parquet")
    replace(catalogue, scans=catalogue.scans[:3]).write(tmp_path / "few.parquet")
    extract = ("extract", "--model", "intensity", "--scans", "few.parquet", "--workers", "0")
    ctfm(*extract, cwd=tmp_path)
    store, repair = tmp_path / "features" / "intensity", ("--repair", "--workers", "0")
    verify = ("store", "verify", "features/intensity")
    (chunk,) = (store / "embeddings.zarr" / "cls").glob("c.*")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1])
    (store / "embeddings.zarr" / "zarr.json").write_text("{}")
    report = json.loads(ctfm(*verify, "--json", cwd=tmp_path, code=1))
    assert report["problems"][0]["where"] == "embeddings.zarr/zarr.json"
    printed = ctfm(*verify, *repair, cwd=tmp_path, code=1)
    assert "written anew from the rest of the store: embeddings.zarr/zarr.json" in printed
    assert "no catalogue is at scans.parquet" in printed
    printed = ctfm(*verify, *repair, "--scans", "few.parquet", cwd=tmp_path)
    assert "extracted again, to the bytes of before" in printed
    assert chunk.read_bytes() == whole
    assert "as it was written" in ctfm(*verify, cwd=tmp_path)


def test_models_lists_every_backbone(project: Path) -> None:
    printed = ctfm("models", cwd=project)
    assert "intensity" in printed
    (dinov3,) = (line for line in printed.splitlines() if line.startswith("dinov3-large"))
    assert "362,246" in dinov3


@pytest.mark.parametrize(
    ("model", "total"),
    [
        ("dinov3-base", "86.6 M"),
        ("dinov3-large", "305.2 M"),
        ("medimageinsight", "364.3 M"),
        ("medsiglip", "431.1 M"),
    ],
)
def test_models_show_gives_the_totals_of_the_papers_table(
    tmp_path: Path, model: str, total: str
) -> None:
    printed = ctfm("models", "show", model, "--experts", "6", "--lora", cwd=tmp_path)
    (line,) = (line for line in printed.splitlines() if line.startswith("total"))
    assert line.rstrip().endswith(total)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extract", "--model", "dinov3-lagre"], "did you mean dinov3-large"),
        (["evaluate", "runs/nothing"], "is not a run"),
        (["store", "info", "runs"], "is not a feature store"),
        (["fit-head", "--labels", "nothing.csv"], "nothing.csv"),
        (["fit-head", "--experts", "2"], "--overwrite"),
        (["extract", "--model", "intensity", "--scans", "nothing.parquet"], "nothing.parquet"),
        (["extract", "--model", "intensity", "--windows", "5:1"], "5.0:1.0"),
        (["predict", RUN, "cohort"], "exactly one usable scan"),
        (["phantom", "--out", "cohort"], "cohort"),
        (["evaluate", RUN, "--lesions", "nothing.parquet"], "cannot read lesions from nothing"),
        (["report", RUN, "--lesions", "scans.parquet"], "the table of lesions has the columns"),
        (["extract", "--model", "intensity", "--device", "nonsense"], "no device 'nonsense'"),
        (
            ["extract", "--model", "intensity", "--device", "nonsense", "--scheduler", "tcp://no"],
            "no machine has a device 'nonsense'",
        ),
        (["fit-head", "--device", "cuda:99", "--out", "runs/no"], "no device 'cuda:99'"),
        (["predict", RUN, "cohort", "--device", "meta"], "no device 'meta'"),
    ],
)
def test_what_the_user_can_mend_is_said_without_a_traceback(
    project: Path, arguments: list[str], said: str
) -> None:
    assert said in " ".join(ctfm(*arguments, cwd=project, code=1).split())


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    project: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "a-name-that-is-as-long-as-those-on-a-cluster-are" / "store")
    arguments = ("extract", "--model", "intensity", "--workers", "0", "--out", store)
    printed = ctfm(*arguments, "--dry-run", cwd=project)
    assert "nothing was written" in printed
    assert store in printed.splitlines()
    assert ["scans", "left", str(SCANS)] in [line.split() for line in printed.splitlines()]
    assert not Path(store).exists()


def test_a_dry_run_for_a_cluster_starts_none_and_tries_on_this_machine(project: Path) -> None:
    arguments = ("extract", "--model", "intensity", "--workers", "0", "--out", "dry")
    printed = ctfm(*arguments, "--cluster", "local", "--dry-run", cwd=project)
    assert "nothing was written" in printed
    assert not (project / "dry").exists()


def test_a_choice_that_does_not_exist_is_wrong_usage(project: Path) -> None:
    arguments = ("extract", "--model", "intensity", "--align", "sideways")
    assert "'sideways' is not one of" in ctfm(*arguments, cwd=project, code=2)


def test_a_scan_that_fails_gives_exit_code_3_and_a_table(project: Path, tmp_path: Path) -> None:
    size = ("--matrix", "64", "--slices", "9", "--workers", "0")
    ctfm("phantom", "--scans", "3", "--out", "cohort", *size, cwd=tmp_path)
    ctfm("index", "cohort", cwd=tmp_path)
    chosen = pq.read_table(tmp_path / "scans.parquet", filters=[("usable", "=", True)])
    files = {
        line["scan_id"]: line["files"]
        for line in pq.read_table(tmp_path / "scans.private.parquet").to_pylist()
    }
    Path(files[chosen["scan_id"][0].as_py()][0]).unlink()
    extract = ("extract", "--model", "intensity", "--workers", "0")
    assert "vanished" in ctfm(*extract, cwd=tmp_path, code=3)


def test_an_empty_folder_does_not_replace_a_catalogue(project: Path, tmp_path: Path) -> None:
    for name in ("scans.parquet", "scans.private.parquet"):
        shutil.copy(project / name, tmp_path / name)
    before = (tmp_path / "scans.parquet").read_bytes()
    (tmp_path / "unmounted").mkdir()
    (tmp_path / "unmounted" / "notes.txt").write_text("none")
    printed = ctfm("index", "unmounted", cwd=tmp_path, code=1)
    assert "no file that may be a scan lies under unmounted (1 others do)" in printed
    assert (tmp_path / "scans.parquet").read_bytes() == before


def test_a_dry_run_that_can_read_no_scan_forecasts_nothing(tmp_path: Path) -> None:
    size = ("--matrix", "64", "--slices", "9", "--workers", "0")
    ctfm("phantom", "--scans", "2", "--out", "cohort", *size, cwd=tmp_path)
    ctfm("index", "cohort", cwd=tmp_path)
    shutil.rmtree(tmp_path / "cohort")
    printed = ctfm("extract", "--model", "intensity", "--dry-run", cwd=tmp_path, code=3)
    assert "no forecast: none of the 2 scans that were tried can be used" in printed
    assert "about" not in printed


def test_scans_that_a_new_catalogue_does_not_list_are_said_and_can_be_written_off(
    tmp_path: Path,
) -> None:
    size = ("--matrix", "64", "--slices", "9", "--workers", "0")
    extract = ("extract", "--model", "intensity", "--workers", "0")
    for cohort, seed in (("one", "1"), ("two", "2")):
        ctfm("phantom", "--scans", "5", "--seed", seed, "--out", cohort, *size, cwd=tmp_path)
    ctfm("index", "one", "two", cwd=tmp_path)
    ctfm(*extract, "--task", "0/2", cwd=tmp_path)
    shutil.rmtree(tmp_path / "two")
    ctfm("index", "one", cwd=tmp_path)
    assert "--write-off-unlisted" in ctfm(*extract, cwd=tmp_path, code=3)
    printed = ctfm(*extract, "--write-off-unlisted", cwd=tmp_path, code=3)
    assert "vanished" in printed
    assert "--write-off-unlisted" not in printed


def test_nothing_that_names_a_patient_is_in_any_output(project: Path) -> None:
    planted = {b"PHANTOM"}
    labels = pq.read_table(project / "labels.parquet")
    planted |= {value.encode() for value in labels["study_id"].to_pylist()}
    planted |= {value.encode() for value in labels["patient_id"].to_pylist()}
    outputs = [project / "scans.parquet", *(project / "features").rglob("*")]
    outputs += (project / "runs").rglob("*")
    for path in outputs:
        if path.is_file():
            content = path.read_bytes()
            found = [secret for secret in planted if secret in content]
            assert not found, f"{path.name} holds {found[0]!r}"


def test_help_names_every_step(tmp_path: Path) -> None:
    printed = ctfm("--help", cwd=tmp_path)
    for step in ("phantom", "index", "extract", "fit-head", "evaluate", "predict", "report"):
        assert step in printed


def test_help_takes_no_word_in_brackets_for_markup(tmp_path: Path) -> None:
    assert "[grid]" in ctfm("sweep", "--help", cwd=tmp_path)


def test_doctor_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "not reachable" in ctfm("doctor", cwd=tmp_path)


def test_every_setting_of_a_fit_can_be_set(project: Path) -> None:
    options = ("--preset", "paper", "--rank", "3", "--set", "gamma=0", "--set", "alpha=none")
    ctfm("fit-head", *options, "--max-epochs", "20", "--out", "runs/set", cwd=project)
    config = FitConfig.from_dict(
        tomllib.loads((project / "runs/set/config.toml").read_text())["fit"]
    )
    expected = replace(PRESETS["paper"], rank=3, gamma=0.0, alpha="none", max_epochs=20)
    assert config == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "gama=1"], "unknown settings of a fit: gama"),
        (["--set", "gamma"], "NAME=VALUE"),
        (["--preset", "papers"], "default, paper"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused(
    project: Path, options: list[str], said: str
) -> None:
    code = 2 if said == "NAME=VALUE" else 1
    assert said in ctfm("fit-head", *options, "--out", "runs/none", cwd=project, code=code)
