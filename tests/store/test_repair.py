"""Rebuilding: what the rest of a store tells is written anew, to the same bytes."""

from pathlib import Path

import pytest
from toy_store import all_bytes, create, fill, folder, to_store

from ctfm.store.errors import StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.places import LocalPlace
from ctfm.store.repair import Rebuilt, rebuild_store
from ctfm.store.verify import verify_store

SCANS = [4, 7, 3, 6, 5]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two parts of a plan, three shards, a failed scan, an adapter."""
    create(tmp_path / "s", to_store(SCANS[:2]))
    made = fill(create(tmp_path / "s", to_store(SCANS)), failed=["scan001"])
    made.record_adapter(max_relative_error=1e-7, scan_ids=["a"], patient_ids=["b"])
    return folder(made)


def rebuilt(store: Path) -> Rebuilt:
    place = LocalPlace(store)
    return rebuild_store(place, verify_store(place))


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_every_file_but_chunks_and_adapter_is_written_anew_to_the_same_bytes(
    store: Path, how: str
) -> None:
    before = all_bytes(store)
    for file in before:
        if "/c." in file or file == "adapter.json":
            continue
        if how == "damaged":
            damage(store / file)
        else:
            (store / file).unlink()
        done = rebuilt(store)
        assert done.files == (file,)
        assert (done.shards, done.left) == (0, ())
        assert all_bytes(store) == before, file


def test_several_files_at_once_are_written_anew_to_the_same_bytes(store: Path) -> None:
    before = all_bytes(store)
    names = ["plan/000001.parquet", "commits/000002.json", "embeddings.zarr/zarr.json"]
    for file in names:
        damage(store / file)
    assert set(rebuilt(store).files) == set(names)
    assert all_bytes(store) == before


def test_lost_rows_are_named_and_stay_as_they_are(store: Path) -> None:
    damage(store / "embeddings.zarr" / "cls" / "c.1.0")
    before = all_bytes(store)
    damage(store / "embeddings.zarr" / "mean" / "zarr.json")
    done = rebuilt(store)
    assert done.files == ("embeddings.zarr/mean/zarr.json",)
    assert done.lost_scans == ("scan002", "scan003")
    assert (done.shards, done.left) == (0, ())
    assert all_bytes(store) == before


def test_a_record_and_the_table_lost_together_cost_the_shard_of_the_record(store: Path) -> None:
    before = all_bytes(store)
    damage(store / "commits" / "000001.json")
    damage(store / "scans.parquet")
    done = rebuilt(store)
    assert done.files == ("scans.parquet",)
    assert done.shards == 1
    fill(FeatureStore.open(store), failed=["scan001"])
    assert all_bytes(store) == before


def test_a_damaged_adapter_record_is_left_and_said(store: Path) -> None:
    damage(store / "adapter.json")
    (left,) = rebuilt(store).left
    assert left.where == "adapter.json"
    assert "writes it anew" in left.what
    with pytest.raises(StoreError, match=r"adapter\.json is damaged"):
        _ = FeatureStore.open(store).adapter


def test_a_store_without_plan_and_table_cannot_be_rebuilt(store: Path) -> None:
    damage(store / "plan" / "000000.parquet")
    damage(store / "scans.parquet")
    with pytest.raises(StoreError, match="restore one of them"):
        rebuilt(store)


def test_a_folder_that_is_no_store_is_not_rebuilt(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a feature store"):
        rebuilt(tmp_path)
