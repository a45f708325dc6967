"""A store with one row a scan, as volume backbones write it, through fit, report and prediction."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.heads.config import FitConfig
from ctfm.heads.evaluate import evaluate
from ctfm.heads.fit import fit_head
from ctfm.heads.predict import predict
from ctfm.heads.report import report_run
from ctfm.heads.runs import Run
from ctfm.store.features import FeatureStore
from ctfm.store.plan import ScanToStore
from ctfm.store.results import ScanResult

N, D = 100, 7
FINDINGS = ("mass", "air")
MIDDLE_MM = -80.0
QUICK = FitConfig(
    experts=2,
    rank=1,
    router_hidden=3,
    batch_size=16,
    min_epochs=10,
    max_epochs=10,
    lr_head=0.05,
    min_positives=2,
    split_fractions=(0.6, 0.2, 0.2),
)


def truth() -> np.ndarray:
    return (np.random.default_rng(1).random((N, 2)) < (0.5, 0.3)).astype(np.int8)


def scan_row(index: int) -> np.ndarray:
    """Noise, and a bright number of its own for each finding."""
    row = np.random.default_rng([2, index]).normal(size=(1, D)).astype(np.float32)
    row[0, :2] += 4 * truth()[index]
    return row


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    scans = [
        ScanToStore(scan_id=f"c{i}", study_id=f"s{i}", patient_id=f"p{i}", max_rows=1)
        for i in range(N)
    ]
    made = FeatureStore.create(
        tmp_path_factory.mktemp("volumes") / "store",
        settings={"backbone": "a volume backbone", "template": None},
        tokens={"cls": D},
        dtype="float32",
        scans=scans,
    )
    for shard in made.pending_shards():
        results = [
            ScanResult(
                scan_id=scan.scan_id,
                rows={"cls": scan_row(int(scan.scan_id[1:]))},
                position_mm=np.array([MIDDLE_MM], np.float32),
            )
            for scan in shard.scans
        ]
        made.write_shard(shard, results)
    made.finish()
    return made


@pytest.fixture(scope="module", params=["attention", "mean"])
def run(
    request: pytest.FixtureRequest, store: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("run")
    columns = dict(zip(FINDINGS, truth().T.tolist(), strict=True))
    pq.write_table(pa.table({"scan_id": [f"c{i}" for i in range(N)], **columns}), folder / "y.pq")
    config = replace(QUICK, pool=request.param)
    return fit_head(store, folder / "y.pq", config, out=folder / "run")


def test_the_store_holds_a_row_for_every_scan_and_nothing_else(store: FeatureStore) -> None:
    rows, offsets = store.load([f"c{i}" for i in range(N)])
    assert rows.shape == (N, D)
    assert offsets.tolist() == list(range(N + 1))
    assert store.verify().ok


def test_a_head_learns_what_is_planted(run: Run) -> None:
    assert run.summary["macro_auc"]["test"] > 0.85
    assert evaluate(run).macro_auc == pytest.approx(run.summary["macro_auc"]["test"])


def test_the_only_row_gets_all_the_attention(run: Run) -> None:
    for line in run.attention().to_pylist():
        assert line["attention"] == [1.0]
        assert line["position_mm"] == [MIDDLE_MM]


def test_prediction_is_the_linear_head_on_that_row(store: FeatureStore, run: Run) -> None:
    rows, _ = store.load(["c3"])
    found = predict(run, rows, np.array([MIDDLE_MM]))
    logits = run.predictions().filter(pa.compute.field("scan_id") == "c3")
    assert found.logits.tolist() == pytest.approx(
        [logits[f"logit_{name}"][0].as_py() for name in FINDINGS], abs=1e-5
    )
    (top,) = found.top_slices("mass")
    assert (top.slice_index, top.position_mm, top.attention) == (0, MIDDLE_MM, 1.0)


def test_report_and_enrichment_do_not_need_a_second_row(run: Run, tmp_path: Path) -> None:
    report_run(run, tmp_path / "report.html")
    assert "mass" in (tmp_path / "report.html").read_text()
    lesions = pa.table(
        {
            "study_id": [f"s{i}" for i in range(N)],
            "finding": ["mass"] * N,
            "focal": [True] * N,
            "z_min_mm": [-85.0] * N,
            "z_max_mm": [-75.0] * N,
        }
    )
    report_run(run, tmp_path / "report.html", lesions=lesions)
