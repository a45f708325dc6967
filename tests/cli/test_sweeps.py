"""Sweeps on a cluster, as a user types them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ctfm
from dask_processes import running_scheduler, running_worker
from toy_store import create, results_of, to_store

SCANS = 48
SPLITS = ("train", "train", "validation", "test")

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of distributed, about its own parts


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


def test_the_heads_of_a_cluster_are_those_of_this_process(project: Path, tmp_path: Path) -> None:
    """Also where workers were started in another folder than the one that the store is in."""
    sweep = ("sweep", "--grid", "experts=0,2", "seed=0:2", "--set", "max_epochs=2")
    few = ("--set", "min_epochs=1", "--set", "min_positives=2", "--side-by-side", "2")
    with (
        running_scheduler(tmp_path) as scheduler,
        running_worker(scheduler),
        running_worker(scheduler),
    ):
        ctfm(*sweep, *few, "--scheduler", scheduler, cwd=project)
    ctfm(*sweep, *few, "--out", "sweeps/here", cwd=project)
    tables = [
        pq.read_table(project / "sweeps" / name / "sweep.parquet").drop_columns("seconds")
        for name in ("toy", "here")
    ]
    assert tables[0].num_rows == 4
    assert tables[0].equals(tables[1])
