"""Stores on object storage: the bytes and the behaviour of a store in a folder."""

import pickle
from pathlib import Path

import pytest
import torch
from obstore.exceptions import GenericError
from toy_store import all_bytes, create, fill, folder, results_of, to_store

from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.merge import merge_stores
from ctfm.store.places import place_of
from ctfm.store.repair import rebuild_store
from ctfm.store.verify import verify_store

SCANS = [4, 7, 3, 6, 5]


def remote_bytes(url: str) -> dict[str, bytes]:
    place = place_of(url)
    return {name: place.read(name) for name, _ in place.files()}


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/features/toy"


@pytest.fixture
def local(tmp_path: Path) -> FeatureStore:
    create(tmp_path / "s", to_store(SCANS[:2]))
    return fill(create(tmp_path / "s", to_store(SCANS)), failed=["scan001"])


@pytest.fixture
def remote(url: str) -> FeatureStore:
    create(url, to_store(SCANS[:2]))
    return fill(create(url, to_store(SCANS)), failed=["scan001"])


@pytest.mark.parametrize("compress", [False, True])
def test_has_the_bytes_of_a_store_in_a_folder(url: str, tmp_path: Path, compress: bool) -> None:
    for place in (url, tmp_path / "s"):
        fill(create(place, to_store(SCANS), compress=compress), failed=["scan001"])
    assert remote_bytes(url) == all_bytes(tmp_path / "s")


def test_loads_what_a_store_in_a_folder_loads(local: FeatureStore, remote: FeatureStore) -> None:
    for ids in (None, ["scan004", "scan000"], ["scan003"], []):
        for mine, theirs in zip(local.load(ids, "mean"), remote.load(ids, "mean"), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(local.positions(ids)[0], remote.positions(ids)[0])
    assert remote.scans.equals(local.scans)
    assert remote.info() == local.info()
    assert remote.verify() == local.verify()


def test_opens_by_its_url_and_by_its_path(remote: FeatureStore, url: str) -> None:
    assert FeatureStore.exists(url)
    assert str(remote.path) == url
    assert FeatureStore.open(remote.path).fingerprint == remote.fingerprint
    again: FeatureStore = pickle.loads(pickle.dumps(remote))  # noqa: S301
    assert torch.equal(again.load()[0], remote.load()[0])


def test_what_is_no_store_is_said_so(bucket: str) -> None:
    assert not FeatureStore.exists(f"{bucket}/nothing")
    with pytest.raises(StoreError, match="is not a feature store"):
        FeatureStore.open(f"{bucket}/nothing")
    with pytest.raises(StoreError, match="is not a feature store"):
        verify_store(place_of(f"{bucket}/nothing"))
    place_of(f"{bucket}/taken").publish("thesis.txt", b"mine")
    with pytest.raises(StoreError, match="exists and is not a feature store"):
        create(f"{bucket}/taken", to_store(SCANS))


def test_resumes_appends_and_takes_back(url: str, local: FeatureStore) -> None:
    store = create(url, to_store(SCANS[:2]))
    (first,) = store.pending_shards()
    store.write_shard(first, results_of(first, failed=["scan001"]))
    store = create(url, to_store(SCANS))
    assert first not in store.pending_shards()
    fill(store, failed=["scan001"])
    assert remote_bytes(url) == all_bytes(folder(local))
    assert store.take_back(["scan001"]) == 1
    fill(store, failed=["scan001"])
    assert remote_bytes(url) == all_bytes(folder(local))


def test_refuses_other_settings(remote: FeatureStore, url: str) -> None:
    with pytest.raises(StoreError, match='backbone: "intensity" in the store, "other" now'):
        create(url, to_store(SCANS), settings={"backbone": "other"})


def test_keeps_the_record_of_an_adapter(remote: FeatureStore) -> None:
    assert remote.adapter is None
    remote.record_adapter(max_relative_error=1e-7, scan_ids=["a"], patient_ids=["b"])
    assert remote.adapter == {"max_relative_error": 1e-7, "scan_ids": ["a"], "patient_ids": ["b"]}
    assert remote.verify().ok


@pytest.mark.slow
def test_finds_a_flipped_bit_in_every_object_and_mends_it(remote: FeatureStore, url: str) -> None:
    place, before = place_of(url), remote_bytes(url)
    for name, content in before.items():
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 8
        place.publish(name, bytes(flipped))
        report = verify_store(place)
        assert name in {problem.where for problem in report.problems}
        done = rebuild_store(place, report)
        assert done.left == ()
        store = FeatureStore.open(url)
        for shard in store.shards():
            lost = set(done.lost_scans) & set(shard.scan_ids())
            results = results_of(shard, failed=["scan001"])
            if lost:
                assert store.write_again(shard, [one for one in results if one.scan_id in lost])
        assert remote_bytes(url) == before, name


def test_merges_from_a_folder_to_a_bucket_and_back(
    local: FeatureStore, bucket: str, tmp_path: Path
) -> None:
    merge_stores([folder(local)], f"{bucket}/a", shard_scans=2)
    merge_stores([f"{bucket}/a"], tmp_path / "back", shard_scans=2)
    assert remote_bytes(f"{bucket}/a") == all_bytes(tmp_path / "back")
    assert torch.equal(FeatureStore.open(tmp_path / "back").load()[0], local.load()[0])


def test_finds_objects_that_are_gone(remote: FeatureStore, url: str) -> None:
    place = place_of(url)
    place.delete("embeddings.zarr/mean/c.0.0")
    (problem,) = verify_store(place).problems
    assert problem.what == "the chunk file is missing"


def test_a_server_that_stops_answering_is_not_taken_for_damage(
    remote: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctfm.store.places.RETRY_TIMEOUT_S", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    again: FeatureStore = pickle.loads(pickle.dumps(remote))  # noqa: S301
    for attempt in (again.load, again.verify, again.finish):
        with pytest.raises(PlaceError, match="Check the bucket, the network"):
            attempt()


def test_a_server_that_dies_between_two_chunks_is_not_taken_for_damage(
    remote: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise GenericError("connection reset")

    monkeypatch.setattr("ctfm.store.embeddings.read_rows", dies)
    monkeypatch.setattr("ctfm.store.shard_check.np.asarray", dies)
    for attempt in (remote.load, remote.verify):
        with pytest.raises(PlaceError, match="connection reset"):
            attempt()
