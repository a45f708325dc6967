"""A small store with a planted signal and its labels, for tests of whole fits."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.store.features import FeatureStore
from ctfm.store.plan import ScanToStore
from ctfm.store.results import ScanResult

SCANS, DIM, FINDINGS = 90, 6, ("mass", "atrophy", "air")

BuildStore = Callable[..., FeatureStore]


def build(
    path: Path,
    scans: Sequence[Sequence[np.ndarray]],
    *,
    name: str = "planted",
    dtype: str = "float16",
    shard_scans: int = 64,
) -> FeatureStore:
    """A finished store of the given rows: a list of views for each scan, two scans a patient."""
    made = FeatureStore.create(
        path,
        settings={"backbone": name},
        tokens={"cls": scans[0][0].shape[1]},
        dtype=dtype,  # type: ignore[arg-type]
        scans=[
            ScanToStore(
                scan_id=f"scan{i:03d}",
                study_id=f"study{i:03d}",
                patient_id=f"patient{i // 2:03d}",
                max_rows=max(len(rows) for rows in views),
                view=view,
            )
            for i, views in enumerate(scans)
            for view in range(len(views))
        ],
        shard_scans=shard_scans,
    )
    for shard in made.pending_shards():
        made.write_shard(
            shard, [_result(scan, scans[int(scan.scan_id[4:])]) for scan in shard.scans]
        )
    made.finish()
    return made


def _result(scan: ScanToStore, views: Sequence[np.ndarray]) -> ScanResult:
    rows = views[scan.view]
    return ScanResult(
        scan_id=scan.scan_id,
        view=scan.view,
        rows={"cls": rows},
        position_mm=-4 * np.arange(len(rows), dtype=np.float32) - 2,
    )


def planted_labels_array() -> np.ndarray:
    y = (np.random.default_rng(1).random((SCANS, 3)) < (0.5, 0.3, 0.2)).astype(np.float32)
    y[np.random.default_rng(2).random((SCANS, 3)) < 0.05] = np.nan
    return y


def planted_rows(index: int, *, dim: int = DIM) -> np.ndarray:
    """Noise, and a bright number of its own in one slice for each finding."""
    random = np.random.default_rng([3, index])
    rows = random.normal(size=(2 + index % 5, dim)).astype(np.float32)
    for c in np.flatnonzero(planted_labels_array()[index] == 1):
        rows[random.integers(len(rows)), c] += 8
    return rows


@pytest.fixture(scope="session")
def build_store() -> BuildStore:
    """Makes a finished store of rows; see `build`."""
    return build


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """90 scans of 2 to 6 slices."""
    path = tmp_path_factory.mktemp("planted") / "store"
    return build(path, [[planted_rows(i)] for i in range(SCANS)])


@pytest.fixture(scope="session")
def planted_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their labels, some unknown."""
    path = tmp_path_factory.mktemp("labels") / "labels.parquet"
    columns = {
        name: [None if np.isnan(value) else int(value) for value in column]
        for name, column in zip(FINDINGS, planted_labels_array().T, strict=True)
    }
    pq.write_table(pa.table({"scan_id": [f"scan{i:03d}" for i in range(SCANS)], **columns}), path)
    return path


@pytest.fixture(scope="session")
def planted_rows_of() -> Callable[[int], np.ndarray]:
    """The rows of one scan of `planted_store`."""
    return planted_rows
