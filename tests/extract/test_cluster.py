"""Extraction on real worker processes: the same bytes as on one, whoever dies."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import timm
import torch
import zarr
from dask_crashes import Crash
from safetensors.torch import save_file

from ctfm.extract.cluster import Part, _resident, connect, extract_on_cluster, run_part
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import Progress, create_store, extract_all
from ctfm.extract.readers import DIED, read_jobs
from ctfm.extract.targets import TargetSpec, default_store
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import BackboneError, ClusterError, ConfigError
from ctfm.store.features import FeatureStore
from ctfm.store.reasons import Reason

if TYPE_CHECKING:
    from distributed import Client

CONFIG = ExtractConfig(backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37)
OTHER = ExtractConfig(
    backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37, dtype="float32"
)
OPTIONS = Options(device="auto", batch_size=13, workers=1, shard_scans=2)

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of distributed, about its own parts


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    write_cohort(folder, scans=18, seed=1, matrix=64, slices=9, extras=0.0)
    return index([folder], key=bytes(32))


@pytest.fixture(scope="module")
def client() -> "Iterator[Client]":
    with connect(cluster="local", workers=2) as client:
        client.wait_for_workers(2)
        yield client


def spec(store: Path, config: ExtractConfig = CONFIG) -> TargetSpec:
    return TargetSpec(config=config, store=str(store))


def contents(store: Path) -> dict[str, bytes]:
    group = zarr.open_group(str(store / "embeddings.zarr"), mode="r")
    arrays = {name: np.asarray(array[:]).tobytes() for name, array in group.arrays()}
    return {**arrays, "scans.parquet": (store / "scans.parquet").read_bytes()}


@pytest.fixture(scope="module")
def alone(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("alone") / "store"
    options = Options(batch_size=13, workers=0, shard_scans=2)
    extract_all(catalogue, [spec(store).load()], options=options)
    return store


def test_two_workers_fill_two_stores_with_the_bytes_of_one_process(
    catalogue: Catalogue, client: "Client", alone: Path, tmp_path: Path
) -> None:
    told: list[int] = []
    planned: list[int] = []
    stores = extract_on_cluster(
        catalogue,
        [spec(tmp_path / "a"), spec(tmp_path / "b", OTHER)],
        client=client,
        options=OPTIONS,
        progress=Progress(planned=planned.append, done=lambda reason: told.append(1)),
    )
    assert contents(tmp_path / "a") == contents(alone)
    assert planned == [len(told)] == [stores[0].scans.num_rows]
    assert stores[1].info()["scans"] == stores[0].info()["scans"]
    assert all(store.verify().ok for store in stores)


def test_a_worker_killed_in_the_middle_costs_nothing(
    catalogue: Catalogue, client: "Client", alone: Path, tmp_path: Path
) -> None:
    pids = list(client.run(os.getpid).values())
    left: list[int] = []
    killed = threading.Thread(target=_kill_after_a_commit, args=(tmp_path / "store", pids[0], left))
    killed.start()
    extract_on_cluster(catalogue, [spec(tmp_path / "store")], client=client, options=OPTIONS)
    killed.join()
    assert left[0] > 0
    assert contents(tmp_path / "store") == contents(alone)
    assert FeatureStore.open(tmp_path / "store").verify().ok


@contextmanager
def crashing(client: "Client", scan_ids: set[str], where: str, deaths: Path) -> Iterator[None]:
    """Scans kill the workers of a cluster, whose scheduler believes it at the first time."""
    deaths.mkdir()
    scheduler = client.cluster.scheduler
    before, scheduler.allowed_failures = scheduler.allowed_failures, 0
    client.register_plugin(Crash(scan_ids, where, deaths))
    try:
        yield
    finally:
        client.unregister_worker_plugin("crash")
        scheduler.allowed_failures = before


def test_a_decoder_that_crashes_a_worker_costs_its_scan_alone(
    catalogue: Catalogue, client: "Client", alone: Path, tmp_path: Path
) -> None:
    """As where readers are local: it is read in a process of its own, which dies in its place."""
    store, deaths = tmp_path / "store", tmp_path / "deaths"
    killer = FeatureStore.open(alone).scans["scan_id"][7].as_py()
    readers_in_the_worker = replace(OPTIONS, workers=0)
    with crashing(client, {killer}, "read", deaths):
        (filled,) = extract_on_cluster(
            catalogue, [spec(store)], client=client, options=readers_in_the_worker
        )
    # The planted crash is in the worker alone: in a process of its own the scan can be read.
    assert contents(store) == contents(alone)
    assert filled.verify().ok
    assert list(deaths.iterdir())


@pytest.mark.slow
def test_a_scan_that_kills_its_worker_whatever_reads_it_is_given_up_and_the_rest_goes_on(
    catalogue: Catalogue, client: "Client", alone: Path, tmp_path: Path
) -> None:
    store, deaths = tmp_path / "store", tmp_path / "deaths"
    scans = FeatureStore.open(alone).scans
    killers = {scans["scan_id"][i].as_py() for i in (2, 11)}
    told: list[Reason] = []
    with crashing(client, killers, "embed", deaths):
        (filled,) = extract_on_cluster(
            catalogue,
            [spec(store)],
            client=client,
            options=OPTIONS,
            progress=Progress(done=told.append),
        )
        assert extract_on_cluster(catalogue, [spec(store)], client=client, options=OPTIONS)
    lines = {line["scan_id"]: line for line in filled.scans.to_pylist()}
    assert {one for one, line in lines.items() if line["reason"] == "reader_crashed"} == killers
    assert {line["detail"] for line in lines.values() if line["status"] == "failed"} == {DIED}
    assert all(line["status"] == "ok" for one, line in lines.items() if one not in killers)
    assert told.count(Reason.READER_CRASHED) == 2
    assert filled.verify().ok
    assert len(list(deaths.iterdir())) >= 4  # each killed twice before it was given up
    before = {line["scan_id"]: line["sha256"] for line in scans.to_pylist()}
    neighbours = [
        one for one in lines if lines[one]["shard"] not in {lines[k]["shard"] for k in killers}
    ]
    assert all(lines[one]["sha256"] == before[one] for one in neighbours)


@pytest.mark.slow
def test_where_every_scan_kills_it_is_not_the_scans(
    catalogue: Catalogue, client: "Client", tmp_path: Path
) -> None:
    few = replace(catalogue, scans=catalogue.scans.slice(0, 2))
    with (
        crashing(client, {"*"}, "embed", tmp_path / "deaths"),
        pytest.raises(ClusterError, match="died again and again, whatever the scan"),
    ):
        extract_on_cluster(few, [spec(tmp_path / "store")], client=client, options=OPTIONS)
    store = FeatureStore.open(tmp_path / "store")
    assert store.info()["failures"] == {}
    assert len(store.pending_shards()) == len(store.shards())


def test_scans_that_the_catalogue_does_not_list_are_left_until_written_off_on_a_cluster_too(
    catalogue: Catalogue, client: "Client", tmp_path: Path
) -> None:
    here = spec(tmp_path / "store")
    options = Options(batch_size=13, workers=0, shard_scans=2, task=(0, 5))
    extract_all(catalogue, [here.load()], options=options)
    kept = catalogue.scans.slice(0, 2)
    files = {scan_id: catalogue.files[scan_id] for scan_id in kept["scan_id"].to_pylist()}
    shrunken = replace(catalogue, scans=kept, files=files)
    (store,) = extract_on_cluster(shrunken, [here], client=client, options=OPTIONS)
    assert store.info()["failures"] == {}
    assert store.info()["scans"]["pending"] > 0
    written_off = replace(OPTIONS, write_off_unlisted=True)
    (store,) = extract_on_cluster(shrunken, [here], client=client, options=written_off)
    assert set(store.info()["failures"]) == {"vanished"}
    assert "pending" not in store.info()["scans"]


def _kill_after_a_commit(store: Path, pid: int, left: list[int]) -> None:
    """Kill a process, and tell how many shards were pending then."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and not list((store / "commits").glob("0*.json")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    left.append(len(FeatureStore.open(store).pending_shards()))


def test_a_scheduler_that_does_not_answer_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctfm.extract.cluster.CONNECT_TIMEOUT_S", 0.2)
    with (
        pytest.raises(ConfigError, match="no scheduler answers"),
        connect(scheduler="tcp://127.0.0.1:9"),
    ):
        pass


def test_a_cluster_whose_package_is_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ConfigError, match=r"ctfm\[slurm\]"), connect(cluster="slurm"):
        pass


def test_a_model_and_its_adapter_have_a_folder_of_their_own() -> None:
    features = Path("features")
    assert default_store(features, "timm:vit_b") == features / "timm-vit_b"
    assert default_store(features, "hf:a/b", Path("x/lora1")) == features / "hf-a-b+lora1"


def test_a_worker_with_other_weights_under_the_same_path_writes_nothing(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    def write_weights(seed: int) -> None:
        torch.manual_seed(seed)
        network = timm.create_model("test_vit", num_classes=0)
        save_file(network.state_dict(), tmp_path / "w.safetensors")

    config = replace(CONFIG, backbone="timm:test_vit")
    options = Options(batch_size=13, workers=0, shard_scans=2)
    own = TargetSpec(
        config=config, store=str(tmp_path / "store"), weights=str(tmp_path / "w.safetensors")
    )
    write_weights(0)
    target = own.load()
    store = create_store(catalogue, target, options=options)
    shards = tuple(shard.index for shard in store.pending_shards()[:1])
    ids = store.pending_shards()[0].scan_ids()
    part = Part(
        specs=(own,),
        shards=(shards,),
        scan_ids=(tuple(ids),),
        reads=read_jobs(catalogue, ids),
        options=options,
        template=None,
    )
    write_weights(1)
    with pytest.raises(BackboneError, match="backbone_weights is"):
        run_part(part)
    assert len(FeatureStore.open(store.path).pending_shards()) == len(store.shards())
    write_weights(0)
    _resident.cache_clear()
    assert run_part(part) == ["ok", "ok"]
