"""A project folder as a user has one, for tests of commands that fit."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_store import create, results_of, to_store

SCANS = 48
SPLITS = ("train", "train", "validation", "test")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a finished store and labels."""
    folder = tmp_path / "project"
    store = create(folder / "features" / "toy", to_store([3] * SCANS))
    for shard in store.pending_shards():
        store.write_shard(shard, results_of(shard))
    store.finish()
    labels = {
        "scan_id": [f"scan{i:03d}" for i in range(SCANS)],
        "mass": [i % 2 for i in range(SCANS)],
        "split": [SPLITS[i // 3 % 4] for i in range(SCANS)],
    }
    pq.write_table(pa.table(labels), folder / "labels.parquet")
    return folder
