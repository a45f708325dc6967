"""The run folder: what is written comes back, and nothing else passes for it."""

import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctfm.heads import runs
from ctfm.heads.branches import branches_state, build_branches
from ctfm.heads.config import FitConfig
from ctfm.heads.runs import (
    Run,
    RunWriter,
    StoreRecord,
    check_run_folder,
    predictions_table,
)
from ctfm.store import files
from ctfm.store.errors import RunError, StoreError

D, FINDINGS = 5, ("mass", "air", "atrophy")
CONFIG = FitConfig(experts=2, rank=1, router_hidden=3, findings=FINDINGS, expert_bias=True)
SCANS = pa.table({name: ["a"] for name in ("scan_id", "study_id", "patient_id", "split")})
ATTENTION = pa.table(
    {"scan_id": ["a"], "split": ["a"], "position_mm": [[-2.0, -6.0]], "attention": [[0.5, 0.5]]}
)
SETTINGS = {"backbone": "x", "template": None, "windows_hu": [[0.0, 80.0]], "deep": {"none": None}}


def write(path: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    writer = RunWriter(path)
    writer.start()
    record = StoreRecord(fingerprint="f00d", settings=SETTINGS)
    writer.write_config(CONFIG, dims=[D], findings=FINDINGS, stores=[record])
    for last in (1, 2):
        records = [{"epoch": epoch, "auc": math.nan} for epoch in range(1, last + 1)]
        writer.write_epochs(records, checkpoint=b"to go on from")
    writer.finish(
        branches_state(build_branches(CONFIG, dims=[D], findings=len(FINDINGS))),
        predictions=predictions_table(
            SCANS, findings=FINDINGS, logits=np.zeros((1, 3)), labels=np.ones((1, 3))
        ),
        attention=ATTENTION,
        summary={"best_epoch": 2, "macro_auc": {"test": math.inf}, "seed": seed},
    )
    return path


def read_all(path: Path) -> None:
    run = Run.open(path)
    run.head()
    run.epochs()


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = Run.open(write(tmp_path / "deep" / "run"))
    torch.manual_seed(0)
    expected = branches_state(build_branches(CONFIG, dims=[D], findings=3))
    head = run.head()
    assert all(torch.equal(head.state_dict()[name], expected[name]) for name in expected)
    assert not head.training
    assert (run.config, run.findings, run.dims) == (CONFIG, FINDINGS, (D,))
    assert [store.fingerprint for store in run.stores] == ["f00d"]
    assert run.predictions()["scan_id"].to_pylist() == ["a"]
    assert run.attention().to_pylist() == ATTENTION.to_pylist()
    assert run.epochs() == [{"epoch": 1, "auc": None}, {"epoch": 2, "auc": None}]
    assert run.summary["best_epoch"] == 2
    assert run.summary["macro_auc"] == {"test": None}


def test_every_file_is_readable_without_ctfm(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert tomllib.loads((path / "config.toml").read_text())["head"]["dims"] == [D]
    assert pq.read_table(path / "predictions.parquet").num_rows == 1
    assert json.loads((path / "summary.json").read_text())["best_epoch"] == 2
    assert sorted(file.name for file in path.iterdir()) == [
        "attention.parquet",
        "config.toml",
        "head.safetensors",
        "metrics.jsonl",
        "predictions.parquet",
        "summary.json",
    ]


def test_a_checkpoint_is_there_until_the_run_is_finished(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    assert writer.checkpoint() is None
    writer.write_epochs([{"epoch": 1}], checkpoint=b"one")
    assert RunWriter(tmp_path).checkpoint() == b"one"
    assert RunWriter(write(tmp_path)).checkpoint() is None
    (tmp_path / "checkpoint.safetensors").write_bytes(b"left over")
    assert RunWriter(tmp_path).checkpoint() is None


def test_settings_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = Run.open(write(tmp_path))
    assert run.stores[0].settings == {"backbone": "x", "windows_hu": [[0.0, 80.0]], "deep": {}}


def test_a_folder_that_is_no_run_or_no_finished_one_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run .* that `ctfm fit-head` made"):
        Run.open(tmp_path / "nowhere")
    path = write(tmp_path / "run")
    (path / "summary.json").unlink()
    with pytest.raises(RunError, match="is an unfinished run"):
        Run.open(path)


@pytest.mark.parametrize("name", ["config.toml", "head.safetensors", "metrics.jsonl"])
def test_a_file_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    path, other = write(tmp_path / "a"), write(tmp_path / "b", seed=1)
    (path / name).write_bytes((other / name).read_bytes() + b"\n")
    with pytest.raises(RunError, match=f"{name} is missing, or is not the file"):
        read_all(path)


@pytest.mark.parametrize("name", ["predictions.parquet", "attention.parquet"])
def test_a_missing_file_is_refused_when_it_is_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path)
    (path / name).unlink()
    run = Run.open(path)
    with pytest.raises(RunError, match=f"{name} is missing"):
        (run.predictions() if name.startswith("p") else run.attention())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sha256": {}}'])
def test_a_damaged_summary_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path)
    (path / "summary.json").write_text(content)
    with pytest.raises(RunError, match=r"is damaged|is missing"):
        Run.open(path)


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = Run.open(write(tmp_path))
    object.__setattr__(run, "dims", (D + 1,))
    with pytest.raises(RunError, match=r"does not fit config\.toml"):
        run.head()


def test_beginning_a_run_removes_the_old_one_from_its_summary_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    removed: list[str] = []
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        removed.append(self.name)
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    RunWriter(path).start()
    assert removed[0] == "summary.json"
    assert list(path.iterdir()) == []


def test_the_summary_is_published_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[str] = []
    real = files.publish_bytes

    def publish(path: Path, data: bytes) -> None:
        published.append(path.name)
        real(path, data)

    monkeypatch.setattr(runs, "publish_bytes", publish)
    write(tmp_path)
    assert published[0] == "config.toml"
    assert published[-1] == "summary.json"


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write(tmp_path / "file" / "run")


def test_the_folder_is_checked_before_a_fit(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "new", overwrite=False)
    path = write(tmp_path / "run")
    check_run_folder(path, overwrite=True)
    with pytest.raises(RunError, match="--overwrite"):
        check_run_folder(path, overwrite=False)
    (path / "summary.json").unlink()
    check_run_folder(path, overwrite=False)
    (path / "config.toml").write_text("[tool]")
    with pytest.raises(RunError, match="is not a run's"):
        check_run_folder(path, overwrite=True)


def test_predictions_hold_logit_probability_and_nullable_label() -> None:
    scans = pa.table({name: ["a", "b"] for name in ("scan_id", "study_id", "patient_id", "split")})
    logits = np.array([[0.0, 100.0, -3.0], [1.0, -1.0, 2.0]], np.float32)
    labels = np.array([[1, np.nan, 0], [np.nan, 0, 1]], np.float32)
    table = predictions_table(scans, findings=FINDINGS, logits=logits, labels=labels)
    kinds = [f"{kind}_{name}" for name in FINDINGS for kind in ("logit", "probability", "label")]
    assert table.column_names == ["scan_id", "study_id", "patient_id", "split", *kinds]
    assert table["label_mass"].to_pylist() == [1, None]
    assert table["label_air"].to_pylist() == [None, 0]
    assert table["logit_atrophy"].to_pylist() == [-3.0, 2.0]
    assert table["probability_mass"].to_pylist() == pytest.approx([0.5, 1 / (1 + math.exp(-1))])
    assert table.schema.field("label_mass").type == pa.int8()
    assert table.schema.field("logit_mass").type == pa.float32()
