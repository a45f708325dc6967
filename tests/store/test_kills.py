"""Killed between any two publications, a store is unfinished; the same command again ends it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from kills import contents, windows
from toy_store import create, fill, folder, to_store

from ctfm.store.errors import StoreError
from ctfm.store.export import export_store
from ctfm.store.features import FeatureStore
from ctfm.store.merge import merge_stores
from ctfm.store.places import place_of
from ctfm.store.verify import verify_store

FEW, MORE = to_store([4, 7, 3]), to_store([4, 7, 3, 6, 5])


def make(place: Path) -> None:
    store = create(place, FEW, ids="key of a")
    store.record_weights(hub_id="of/someone", commit="0" * 40)
    fill(store, failed=["scan001"])


def extend(place: Path) -> None:
    fill(create(place, MORE, ids="key of a"))


def take_back(place: Path) -> None:
    FeatureStore.open(place).take_back(["scan000"])
    fill(FeatureStore.open(place))


@pytest.fixture
def merge(tmp_path: Path) -> Callable[[Path], None]:
    first = fill(create(tmp_path / "a", FEW, ids="key of a"), failed=["scan001"])
    first.record_weights(hub_id="of/someone", commit="0" * 40)
    second = fill(create(tmp_path / "b", MORE[2:], shard_scans=3, ids="key of b"))
    sources = [folder(first), folder(second)]

    def merge_both(place: Path) -> None:
        merge_stores(sources, place, shard_scans=2)

    return merge_both


def says_what_is_true(place: Path, last: str) -> None:
    """What those say who look at a store that somebody was killed at."""
    if last in ("nothing", "ids.json") and not (place / "plan" / "000000.parquet").exists():
        assert not FeatureStore.exists(place)
        with pytest.raises(StoreError, match="not a feature store"):
            verify_store(place_of(place))
        return
    report = verify_store(place_of(place))
    assert report.ok, (last, report.problems)
    store = FeatureStore.open(place)
    assert FeatureStore.exists(place)
    assert report.pending == store.info()["scans"].get("pending", 0)
    assert sum(len(shard.scans) for shard in store.pending_shards()) == report.pending
    if report.pending:
        with pytest.raises(StoreError, match="still pending"):
            store.finished_scans()


@pytest.mark.parametrize("command", [make, extend, take_back])
def test_a_store_killed_in_any_window_says_so_and_is_ended_by_the_same_command(
    command: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: Callable[[Path], object] = (lambda place: None) if command is make else make
    seen, places = [], []
    for last, place in windows(command, tmp_path, monkeypatch, prepare=before):
        says_what_is_true(place, last)
        seen.append(last)
        if last:
            command(place)
        places.append(place)
    whole = contents(places[-1])
    assert all(contents(place) == whole for place in places)
    assert all(verify_store(place_of(place)).ok for place in places)
    assert len(seen) > 3


def test_a_merge_killed_in_any_window_is_ended_by_the_same_command(
    merge: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, places = [], []
    for last, place in windows(merge, tmp_path, monkeypatch):
        says_what_is_true(place, last)
        seen.append(last)
        merge(place)
        places.append(place)
    whole = contents(places[-1])
    assert all(contents(place) == whole for place in places)
    assert {"000000.parquet", "zarr.json", "scans.parquet", "000000.json", ""} <= {*seen}


def test_a_merge_into_what_another_command_began_is_refused(
    merge: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would never get its pending scans; and nothing of it is changed."""
    others = to_store([4, 7, 3, 6, 5, 2, 8])
    for last, place in windows(lambda out: create(out, others), tmp_path / "x", monkeypatch):
        if not FeatureStore.exists(place):
            continue
        before = contents(place)
        with pytest.raises(StoreError, match=r"pending scans that none of the stores has"):
            merge(place)
        assert contents(place) == before, last


def test_what_is_missing_from_a_store_with_records_is_damage(tmp_path: Path) -> None:
    for name in ("scans.parquet", "embeddings.zarr/zarr.json"):
        store = fill(create(tmp_path / name.replace("/", "-"), FEW))
        (folder(store) / name).unlink()
        assert [one.where for one in store.verify().problems] == [name]


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_an_export_killed_in_any_window_is_ended_by_the_same_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(create(tmp_path / "store", FEW))
    places = []

    def export(out: Path) -> None:
        export_store(store, out, to=kind)

    for last, place in windows(export, tmp_path / "x", monkeypatch):
        if last:
            export(place)
        places.append(place)
    assert all(contents(place) == contents(places[-1]) for place in places)
