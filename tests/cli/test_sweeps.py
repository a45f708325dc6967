"""Sweeps as a user types them, here and on a cluster."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import ctfm
from dask_processes import running_scheduler, running_worker

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of distributed, about its own parts


@pytest.mark.slow
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


def test_a_search_by_chance_says_that_its_effects_mix(project: Path) -> None:
    said = ctfm(
        *("sweep", "--grid", "experts=0,2", "lr_head=0.0001,0.01", "seed=0:2"),
        *("--method", "random", "--trials", "5", "--vary-order", "--plot"),
        *("--set", "max_epochs=2", "--set", "min_epochs=1", "--set", "min_positives=2"),
        cwd=project,
    )
    assert "note: 5 of 8 variants are fitted" in said
    assert "0.0001" in said
    assert (project / "sweeps" / "toy" / "sweep.svg").is_file()
    table = pq.read_table(project / "sweeps" / "toy" / "sweep.parquet")
    assert table.num_rows == 5


def test_a_sweep_with_a_head_that_diverged_ends_with_code_3(project: Path) -> None:
    sweep = ("sweep", "--grid", "lr_head=1e38,0.01", "--set", "max_epochs=2")
    few = ("--set", "min_epochs=1", "--set", "min_positives=2")
    said = ctfm(*sweep, *few, cwd=project, code=3)
    assert "1 diverged" in said
    assert "best of 1 by validation macro AUC" in said
