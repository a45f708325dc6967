"""Clusters as they are set up: a scheduler and workers of their own, or jobs of a queue."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import dask.config
import numpy as np
import pytest
import zarr
from commands import ctfm
from dask_processes import running_scheduler, running_worker, wait_until
from distributed import LocalCluster

from ctfm.extract.cluster import connect, extract_on_cluster
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import extract_all
from ctfm.extract.targets import TargetSpec
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ConfigError
from ctfm.store.features import FeatureStore

CONFIG = ExtractConfig(backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37)
OPTIONS = Options(device="auto", batch_size=13, workers=0, shard_scans=2)

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of distributed, about its own parts


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder / "cohort", scans=18, seed=1, matrix=64, slices=9, extras=0.0)
    found = index([folder / "cohort"], key=bytes(32))
    found.write(folder / "scans.parquet")
    return found


@pytest.fixture(scope="module")
def alone(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one undisturbed process makes."""
    store = tmp_path_factory.mktemp("alone") / "store"
    options = Options(batch_size=13, workers=0, shard_scans=2)
    extract_all(catalogue, [spec(store).load()], options=options)
    return store


def spec(store: Path) -> TargetSpec:
    return TargetSpec(config=CONFIG, store=str(store))


def contents(store: Path) -> dict[str, bytes]:
    group = zarr.open_group(str(store / "embeddings.zarr"), mode="r")
    arrays = {name: np.asarray(array[:]).tobytes() for name, array in group.arrays()}
    return {**arrays, "scans.parquet": (store / "scans.parquet").read_bytes()}


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    with running_scheduler(tmp_path) as file:
        yield file


def loads_of_backbones() -> int:
    from ctfm.extract.cluster import _resident

    return _resident.cache_info().misses


def tasks_done() -> int:
    from ctfm.extract.cluster import _resident

    return _resident.cache_info().hits + _resident.cache_info().misses


def kill_after_a_commit(store: Path, process: subprocess.Popen[bytes], left: list[int]) -> None:
    """Kill a process, and tell how many shards were pending then."""
    wait_until(lambda: list((store / "commits").glob("0*")))
    os.kill(process.pid, signal.SIGKILL)
    left.append(len(FeatureStore.open(store).pending_shards()))


@pytest.mark.slow
def test_a_worker_that_is_killed_and_not_replaced_costs_nothing(
    catalogue: Catalogue, alone: Path, scheduler: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with (
        running_worker(scheduler) as first,
        running_worker(scheduler),
        connect(scheduler=scheduler) as client,
    ):
        client.wait_for_workers(2)
        left: list[int] = []
        killer = threading.Thread(target=kill_after_a_commit, args=(store, first, left))
        killer.start()
        extract_on_cluster(catalogue, [spec(store)], client=client, options=OPTIONS)
        killer.join()
        (loads,) = client.run(loads_of_backbones).values()
        (tasks,) = client.run(tasks_done).values()
    assert first.poll() is not None
    assert left[0] > 0
    assert contents(store) == contents(alone)
    assert FeatureStore.open(store).verify().ok
    assert loads == 1
    assert tasks > 1


@pytest.mark.slow
def test_the_command_line_runs_on_a_scheduler(
    catalogue: Catalogue, scheduler: str, tmp_path: Path
) -> None:
    """Also where workers were started in another folder than the one that the store is in."""
    catalogue.write(tmp_path / "scans.parquet")
    with running_worker(scheduler):
        ctfm_extract("--scheduler", scheduler, cwd=tmp_path)
    ctfm_extract("--out", "alone", cwd=tmp_path)
    assert contents(tmp_path / "features" / "intensity") == contents(tmp_path / "alone")


def ctfm_extract(*arguments: str, cwd: Path) -> None:
    ctfm("extract", "--model", "intensity", "--workers", "0", *arguments, cwd=cwd)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A queue of jobs that takes `sbatch` and `scancel`; where it keeps the ids of its jobs."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    jobs = tmp_path / "jobs"
    programs = {
        # A job runs a copy of its script, which is removed when `sbatch` returns.
        "sbatch": f'job=$(mktemp -p {tmp_path}); cp "$1" "$job"; setsid bash "$job" '
        f'>/dev/null 2>&1 & echo "Submitted batch job $!"; echo $! >> {jobs}',
        "scancel": 'kill -9 -- -"$1"',
    }
    for name, does in programs.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    size = {"cores": 1, "memory": "4GB", "interface": "lo", "walltime": None}
    with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in size.items()}):
        yield jobs


def is_running(job: str) -> bool:
    try:
        os.killpg(int(job), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_jobs_of_a_queue_fill_a_store_and_end_with_it(
    catalogue: Catalogue, alone: Path, queue: Path, tmp_path: Path
) -> None:
    with connect(cluster="slurm", workers=2) as client:
        extract_on_cluster(catalogue, [spec(tmp_path / "store")], client=client, options=OPTIONS)
    assert contents(tmp_path / "store") == contents(alone)
    jobs = queue.read_text().split()
    assert len(jobs) == 2
    wait_until(lambda: not any(map(is_running, jobs)))


def test_a_queue_that_was_not_told_how_large_a_job_is_says_so(queue: Path) -> None:
    with (
        dask.config.set({"jobqueue.slurm.cores": None}),
        pytest.raises(ConfigError, match=r"jobqueue\.yaml"),
        connect(cluster="slurm"),
    ):
        pass


def test_a_cluster_of_the_gpus_of_this_machine_has_a_worker_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def two_gpus(**options: int) -> LocalCluster:
        return LocalCluster(n_workers=2, processes=False, dashboard_address=None, **options)

    package = ModuleType("dask_cuda")
    monkeypatch.setattr(package, "LocalCUDACluster", two_gpus, raising=False)
    monkeypatch.setitem(sys.modules, "dask_cuda", package)
    with connect(cluster="local-cuda", workers=7) as client:
        assert list(client.nthreads().values()) == [1, 1]
