"""`fit-head` as a user types it, and what it says about its labels before it fits."""

import html
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from commands import ctfm
from toy_store import create, to_store
from typer.testing import CliRunner

from ctfm.cli.app import app
from ctfm.cli.labels import join_table, note_near_names, typed_rules
from ctfm.heads.runs import Run
from ctfm.store.catalogue import SCANS_SCHEMA, Catalogue
from ctfm.store.errors import ConfigError
from ctfm.store.label_rules import LabelRules

QUICK = tuple(f"--set={setting}" for setting in ("max_epochs=2", "min_epochs=1", "min_positives=2"))


def test_a_finding_that_is_almost_one_of_the_taxonomy_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    note_near_names(["intraparenchymal_hemorhage", "midline_shift", "our_own_finding"])
    (note,) = capsys.readouterr().err.splitlines()
    assert note.endswith("hemorhage: did you mean intraparenchymal_hemorrhage?")


def test_findings_without_a_name_are_not_all_findings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--findings takes names"):
        typed_rules(tmp_path / "l.csv", findings="")


def test_labels_of_scans_that_cannot_be_used_are_told_with_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = create(tmp_path / "s", to_store([3, 3]))
    reasons = ("ok", "ok", "missing_slices", "unreadable", "missing_slices")
    lines = [
        {
            **{name: f"{name[:-3]}{i:03d}" for name in ("scan_id", "study_id", "patient_id")},
            **{"usable": reason == "ok", "reason": reason, "detail": "", "format": "dicom"},
        }
        for i, reason in enumerate(reasons)
    ]
    files = {str(line["scan_id"]): ["/x"] for line in lines}
    table = pa.Table.from_pylist(lines, schema=SCANS_SCHEMA)
    Catalogue(scans=table, files=files, key=None).write(tmp_path / "scans.parquet")
    rows = [f"scan{i:03d},1" for i in range(5)]
    (tmp_path / "l.csv").write_text("\n".join(["scan_id,mass", *rows, "other,0"]))
    labels, catalogue = tmp_path / "l.csv", tmp_path / "scans.parquet"
    join_table(labels, store, rules=LabelRules(), catalogue=catalogue)
    printed = capsys.readouterr().out
    assert "4 labels without a scan" in printed
    assert "that are not among these: 2 missing_slices, 1 unreadable" in printed


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.split(".")[0].isdigit()


def test_folds_and_seeds_are_one_run_that_names_the_split_it_is_judged_on(project: Path) -> None:
    said = ctfm(
        *("fit-head", "--folds", "3", "--seeds", "2", "--memory", "0.01", "--pool", "per-finding"),
        *("--out", "runs/folds", *QUICK, "--set=min_positives=1"),
        cwd=project,
    )
    run = Run.open(project / "runs" / "folds")
    assert (run.members, run.summary["scans"]["test"]) == (6, 48)
    head, _, members = said.partition("members")
    assert "test macro AUC" in head
    assert "validation macro AUC  " not in head
    assert ["scans", "48", "test"] in [line.split() for line in head.splitlines()]
    assert "0 train" not in said
    for told in run.summary["members"]:
        scans = " / ".join(map(str, told["scans"].values()))
        (line,) = (one for one in members.splitlines() if one.startswith(told["name"]))
        assert scans in line
        assert f"{told['best_epoch']} of {told['last_epoch']}" in line


def test_the_command_of_a_report_runs_as_it_is_printed(project: Path) -> None:
    (project / "tables").mkdir()
    (project / "labels.parquet").rename(project / "tables" / "our labels.parquet")
    typed = ("--labels", "tables/our labels.parquet", "--features", "features/toy")
    out = ("--out", str(project / "runs" / "mine"), "--experts=0")
    ctfm("fit-head", *typed, *out, *QUICK, cwd=project)
    ctfm("report", "runs/mine", "--min-positives", "1", cwd=project)
    page = (project / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    (printed,) = re.findall(r'<pre class="command">(.*?)</pre>', page)
    before = (project / "runs" / "mine" / "head.safetensors").read_bytes()
    shutil.rmtree(project / "runs")
    program, *arguments = shlex.split(html.unescape(printed))
    assert program == "ctfm"
    ctfm(*arguments, cwd=project)
    assert (project / "runs" / "mine" / "head.safetensors").read_bytes() == before


def test_a_tracker_is_not_silently_left_out(project: Path) -> None:
    for several in (("--folds", "3"), ("--seeds", "2")):
        said = ctfm("fit-head", *several, "--log", "tensorboard", cwd=project, code=1)
        assert "leave it out with --folds or --seeds" in said
    assert not (project / "runs").exists()


def test_several_stores_and_a_tracker(project: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional extra")
    (project / "features" / "toy").rename(project / "features" / "a")
    shutil.copytree(project / "features" / "a", project / "features" / "b")
    both = ("--features", "features/a", "--features", "features/b", "--join", "scans")
    ctfm("fit-head", *both, "--log", "tensorboard", *QUICK, cwd=project)
    run = Run.open(project / "runs" / "a+b-molre6")
    assert len(run.dims) == len(run.stores) == 2
    assert any((run.path / "tensorboard").iterdir())
