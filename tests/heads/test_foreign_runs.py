"""Runs of other people: whatever stands in their files, it is checked before it is used."""

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch

from ctfm.heads.branches import branches_state, build_branches
from ctfm.heads.config import FitConfig
from ctfm.heads.evaluate import evaluate
from ctfm.heads.report import report_run
from ctfm.heads.run_schema import Summary
from ctfm.heads.runs import Run, RunWriter, StoreRecord, predictions_table
from ctfm.store.errors import RunError

FINDINGS = ("mass", "air")
CONFIG = FitConfig(experts=0, findings=FINDINGS, min_positives=1)
SUMMARY: dict[str, Any] = {
    "best_epoch": 1,
    "last_epoch": 2,
    "macro_auc": {"validation": 0.5, "test": None},
    "parameters": {"head": 9, "adapter": 0},
    "findings": {
        name: {"positives": {"train": 1}, "negatives": {"train": 1}, "taught": True}
        for name in FINDINGS
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    n = 4
    ids = {name: [str(i) for i in range(n)] for name in ("scan_id", "study_id", "patient_id")}
    scans = pa.table({**ids, "split": ["test"] * n})
    labels = np.array([[0, 1], [1, 0], [0, 1], [1, 0]], float)
    writer = RunWriter(tmp_path / "run")
    writer.start()
    record = StoreRecord(fingerprint="f", settings={"backbone": "intensity"})
    writer.write_config(CONFIG, dims=[3], findings=FINDINGS, stores=[record])
    writer.write_epochs([{"epoch": 1, "train_loss": 0.5, "best": True}], checkpoint=b"")
    lists = {"position_mm": [[-2.0, -6.0]] * n, "attention": [[0.5, 0.5]] * n}
    writer.finish(
        branches_state(build_branches(CONFIG, dims=[3], findings=2)),
        predictions=predictions_table(scans, findings=FINDINGS, logits=labels, labels=labels),
        attention=scans.select(["scan_id", "split"])
        .append_column("position_mm", pa.array(lists["position_mm"]))
        .append_column("attention", pa.array(lists["attention"])),
        summary=SUMMARY,
    )
    return tmp_path / "run"


def tamper(path: Path, name: str, content: bytes) -> None:
    """Another content of a file of a run, with the digest that goes with it."""
    (path / name).write_bytes(content)
    summary = json.loads((path / "summary.json").read_text())
    summary["sha256"][name] = hashlib.sha256(content).hexdigest()
    (path / "summary.json").write_text(json.dumps(summary))


def read_everything(path: Path) -> None:
    run = Run.open(path)
    run.heads()
    evaluate(run)
    report_run(run, path / "report.html")


def put(values: Any, where: str, value: Any) -> None:
    """Set, or with `...` remove, what a dotted name names."""
    *outer, last = where.split(".")
    for name in outer:
        values = values[int(name)] if isinstance(values, list) else values[name]
    if value is ...:
        del values[last]
    else:
        values[last] = value


def test_a_run_that_nobody_changed_is_read(path: Path) -> None:
    read_everything(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("best_epoch", "one"),
        ("best_epoch", 1.5),
        ("best_epoch", -1),
        ("findings", None),
        ("findings", []),
        ("findings.mass", None),
        ("findings.mass.taught", "yes"),
        ("findings.mass.positives", {}),
        ("findings.mass.positives.train", None),
        ("macro_auc", 0.5),
        ("macro_auc.test", "high"),
        ("parameters", {"head": 1}),
        ("command", "ctfm fit-head"),
        ("members", [{"name": "a"}]),
        ("routing", [{}]),
        ("repeats", {"threshold": "auto"}),
        ("side_by_side", 0),
        ("sha256", ["a"]),
        ("sha256.config.toml", 7),
        ("sha256", None),
    ],
)
def test_a_summary_of_other_types_is_refused(path: Path, where: str, value: object) -> None:
    summary = json.loads((path / "summary.json").read_text())
    if where == "sha256.config.toml":
        summary["sha256"]["config.toml"] = value
    else:
        put(summary, where, value)
    (path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RunError, match=r"is damaged, or of another version .*fit the run again"):
        Run.open(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"null", b"7", b'"text"'])
def test_a_summary_that_is_no_table_is_refused(path: Path, content: bytes) -> None:
    (path / "summary.json").write_bytes(content)
    with pytest.raises(RunError, match="is damaged"):
        Run.open(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("head", ...),
        ("fit", ...),
        ("stores", ...),
        ("stores", []),
        ("stores.0.settings", ...),
        ("stores.0.settings", "intensity"),
        ("stores.0.fingerprint", 7),
        ("head.dims", []),
        ("head.dims", [3, 3]),
        ("head.dims", ["3"]),
        ("head.dims", [0]),
        ("head.dims", [10**12]),
        ("head.findings", []),
        ("head.findings", ["mass", "mass"]),
        ("head.findings", "mass"),
        ("ensemble", {"members": 0}),
        ("ensemble", {"members": "3"}),
        ("ensemble", {}),
        ("fit.rank", "8"),
        ("fit.ema", 10**400),
        ("fit.split_fractions", ["a", "b", "c"]),
        ("fit.unheard_of", 1),
    ],
)
def test_a_config_of_other_types_is_refused(path: Path, where: str, value: object) -> None:
    values = tomllib.loads((path / "config.toml").read_text())
    put(values, where, value)
    tamper(path, "config.toml", tomli_w.dumps(values).encode())
    with pytest.raises(RunError, match="is damaged"):
        Run.open(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "molre", "experts": 10**6, "rank": 10**6, "router_hidden": 10**6},
        {"adapter": "mlp", "experts": 10**6, "rank": 10**6},
        {"pool": "gated", "pool_hidden": 10**12},
        {"pool": "gated", "pool_hidden": 10**30},
        {"pool": "per-finding"},
    ],
)
def test_a_head_takes_no_more_memory_than_its_file(path: Path, settings: dict[str, Any]) -> None:
    values = tomllib.loads((path / "config.toml").read_text())
    values["fit"] |= settings
    tamper(path, "config.toml", tomli_w.dumps(values).encode())
    run = Run.open(path)
    with pytest.raises(RunError, match=r"head\.safetensors does not fit config\.toml"):
        run.heads()


def test_members_that_the_file_does_not_have_are_refused(path: Path) -> None:
    values = tomllib.loads((path / "config.toml").read_text())
    tamper(path, "config.toml", tomli_w.dumps({**values, "ensemble": {"members": 10**6}}).encode())
    with pytest.raises(RunError, match="does not fit"):
        Run.open(path).heads()


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("head.safetensors", b"no tensors", Run.heads),
        ("predictions.parquet", b"no table", Run.predictions),
        ("attention.parquet", b"PAR1", Run.attention),
        ("metrics.jsonl", b"{\n", Run.epochs),
        ("metrics.jsonl", b"[]\n", Run.epochs),
        ("metrics.jsonl", b'{"epoch": null}\n', Run.epochs),
        ("metrics.jsonl", b'{"epoch": 1, "train_loss": "low"}\n', Run.epochs),
        ("metrics.jsonl", b"\xff\n", Run.epochs),
    ],
)
def test_a_file_of_another_kind_is_refused(
    path: Path, name: str, content: bytes, read: Callable[[Run], object]
) -> None:
    tamper(path, name, content)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        read(Run.open(path))


@pytest.mark.parametrize("column", ["scan_id", "patient_id", "split", "logit_mass", "label_air"])
def test_predictions_without_a_column_or_with_another_type_of_it_are_refused(
    path: Path, column: str
) -> None:
    table = Run.open(path).predictions()
    index = table.column_names.index(column)
    wrong = pa.array([[{"a": 1}]] * table.num_rows)
    for other in (table.drop_columns([column]), table.set_column(index, column, wrong)):
        tamper(path, "predictions.parquet", parquet(other))
        with pytest.raises(RunError, match=rf"predictions\.parquet is damaged.*{column}"):
            evaluate(path)


def test_attention_that_does_not_fit_its_slices_is_refused(path: Path) -> None:
    table = Run.open(path).attention()
    for values in ([[0.5, 0.2, 0.3]] * 4, [0.5] * 4, [["a", "b"]] * 4):
        other = table.set_column(3, "attention", pa.array(values))
        tamper(path, "attention.parquet", parquet(other))
        with pytest.raises(RunError, match=r"attention\.parquet is damaged.*attention"):
            Run.open(path).attention()


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def test_what_a_summary_does_not_say_is_an_error_of_the_run() -> None:
    with pytest.raises(RunError, match="has no macro_auc"):
        Summary({})["macro_auc"]


def test_a_head_is_loaded_with_its_numbers(path: Path) -> None:
    torch.manual_seed(1)
    state = branches_state(build_branches(CONFIG, dims=[3], findings=2))
    from safetensors.torch import save

    tamper(path, "head.safetensors", save(state))
    loaded = Run.open(path).head().state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
