"""Mishaps around an extraction: a clear sentence, a valid store, and the same bytes later."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from at_once import extract_at_once
from toy_store import all_bytes

from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import Progress, extract
from ctfm.extract.remaining import stale_scans, unused_scans
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.places import place_of
from ctfm.store.pseudonyms import Pseudonyms
from ctfm.store.reasons import Reason

CONFIG = ExtractConfig(backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37)
OPTIONS = Options(batch_size=13, workers=0, shard_scans=2)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, scans=6, seed=1, matrix=64, slices=9, extras=0.0)
    return index([folder], key=bytes(32))


@pytest.fixture(scope="module")
def undisturbed(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    run(catalogue, store)
    return all_bytes(store)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", path):
        pytest.skip("a file system may not be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def mount(*arguments: str | Path) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def run(catalogue: Catalogue, store: Path, progress: Progress | None = None) -> None:
    backbone = get_backbone("intensity")
    extract(catalogue, store, backbone, config=CONFIG, options=OPTIONS, progress=progress)


def usable(catalogue: Catalogue) -> list[str]:
    lines = catalogue.scans.select(["scan_id", "usable"]).to_pylist()
    return [line["scan_id"] for line in lines if line["usable"]]


@pytest.mark.parametrize("kilobytes", [4, 100, 220])
def test_a_full_disk_stops_it_and_the_next_run_completes_it_to_the_same_bytes(
    catalogue: Catalogue, undisturbed: dict[str, bytes], disk: Path, kilobytes: int
) -> None:
    assert mount("-o", f"remount,size={kilobytes}k", disk)
    with pytest.raises(StoreError, match=r"cannot write .*: the disk is full: free some space"):
        run(catalogue, disk / "store")
    if FeatureStore.exists(disk / "store"):
        assert FeatureStore.open(disk / "store").verify().ok
    assert mount("-o", "remount,size=64m", disk)
    run(catalogue, disk / "store")
    assert all_bytes(disk / "store") == undisturbed
    assert FeatureStore.open(disk / "store").verify().ok


def test_a_disk_that_turns_read_only_stops_it_and_the_next_run_completes_it(
    catalogue: Catalogue, undisturbed: dict[str, bytes], disk: Path
) -> None:
    assert mount("-o", "remount,ro", disk)
    with pytest.raises(StoreError, match="the file system is read-only: choose a folder"):
        run(catalogue, disk / "store")
    assert mount("-o", "remount,rw", disk)
    done = 0

    def read_only_after_four_scans(reason: Reason) -> None:
        nonlocal done
        done += 1
        if done == 4:
            assert mount("-o", "remount,ro", disk)

    with pytest.raises(StoreError, match="the file system is read-only"):
        run(catalogue, disk / "store", Progress(done=read_only_after_four_scans))
    store = FeatureStore.open(disk / "store")
    assert store.verify().ok
    assert store.info()["scans"]["pending"] > 0
    assert mount("-o", "remount,rw", disk)
    run(catalogue, disk / "store")
    assert all_bytes(disk / "store") == undisturbed


def test_a_source_that_vanishes_is_a_reason_and_is_read_when_it_is_back(
    catalogue: Catalogue, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    lost = usable(catalogue)[3]
    folder = Path(catalogue.files[lost][0]).parent
    away = folder.with_name("away")

    def vanish_after_the_first(reason: Reason) -> None:
        if folder.exists():
            folder.rename(away)

    run(catalogue, tmp_path / "store", Progress(done=vanish_after_the_first))
    (line,) = [
        line
        for line in FeatureStore.open(tmp_path / "store").scans.to_pylist()
        if line["status"] != "ok"
    ]
    assert (line["scan_id"], line["reason"]) == (lost, "vanished")
    assert line["detail"] == "a source file is gone or may not be read (FileNotFoundError)"
    assert FeatureStore.open(tmp_path / "store").verify().ok
    run(catalogue, tmp_path / "store")
    assert FeatureStore.open(tmp_path / "store").info()["scans"]["failed"] == 1
    away.rename(folder)
    reads: list[int] = []
    run(catalogue, tmp_path / "store", Progress(planned=reads.append))
    assert reads == [2]
    assert all_bytes(tmp_path / "store") == undisturbed


@pytest.mark.parametrize("retry_failed", [False, True])
def test_good_rows_whose_files_are_gone_are_not_given_up_for_a_scan_that_is_back(
    catalogue: Catalogue, tmp_path: Path, retry_failed: bool
) -> None:
    back, gone = usable(catalogue)[:2]
    folders = {one: Path(catalogue.files[one][0]).parent for one in (back, gone)}

    def run_without(*away: str) -> dict[str, str]:
        for one in away:
            folders[one].rename(folders[one].with_name(f"{one}-away"))
        try:
            done = extract(
                catalogue,
                tmp_path / "store",
                get_backbone("intensity"),
                config=CONFIG,
                options=OPTIONS,
                retry_failed=retry_failed,
            )
        finally:
            for one in away:
                folders[one].with_name(f"{one}-away").rename(folders[one])
        lines = done.store.scans.to_pylist()
        shard = next(line["shard"] for line in lines if line["scan_id"] == back)
        assert shard == next(line["shard"] for line in lines if line["scan_id"] == gone)
        return {line["scan_id"]: line["reason"] for line in lines}

    assert run_without(back)[back] == "vanished"
    assert run_without(gone)[gone] == "ok"
    found = run_without()
    assert (found[back], found[gone]) == ("ok", "ok")


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    """A cohort of its own, of whose first scan the last slices have not arrived yet."""
    write_cohort(tmp_path / "cohort", scans=4, seed=2, matrix=64, slices=12, extras=0.0)
    found = index([tmp_path / "cohort"], key=bytes(32))
    for i, file in enumerate(found.files[usable(found)[0]][-2:]):
        Path(file).rename(tmp_path / f"{i}.arriving")
    return tmp_path


def arrive(folder: Path, catalogue: Catalogue) -> None:
    """The last slices of the first scan arrive."""
    there = Path(catalogue.files[usable(catalogue)[0]][0]).parent
    for file in folder.glob("*.arriving"):
        file.rename(there / f"{file.stem}.dcm")


def rows_of(store: Path, scan_id: str) -> int:
    lines = FeatureStore.open(store).scans.to_pylist()
    return int(next(line["n_rows"] for line in lines if line["scan_id"] == scan_id))


def test_a_scan_of_which_more_slices_have_arrived_is_done_again(growing: Path) -> None:
    before = index([growing / "cohort"], key=bytes(32))
    changed = usable(before)[0]
    run(before, growing / "store")
    partial = rows_of(growing / "store", changed)
    arrive(growing, before)
    after = index([growing / "cohort"], key=bytes(32))
    reads: list[int] = []
    run(after, growing / "store", Progress(planned=reads.append))
    run(after, growing / "alone")
    assert reads == [2]  # its shard
    assert all_bytes(growing / "store") == all_bytes(growing / "alone")
    assert rows_of(growing / "store", changed) > partial
    run(after, growing / "store", Progress(planned=reads.append))
    assert reads[1] == 0


def test_a_scan_that_has_changed_stays_where_others_of_its_shard_cannot_be_read_and_is_said(
    growing: Path,
) -> None:
    before = index([growing / "cohort"], key=bytes(32))
    changed, beside = usable(before)[:2]
    run(before, growing / "store")
    arrive(growing, before)
    after = index([growing / "cohort"], key=bytes(32))
    folder = Path(after.files[beside][0]).parent
    folder.rename(growing / "away")
    whole = all_bytes(growing / "store")
    run(after, growing / "store")
    assert all_bytes(growing / "store") == whole
    assert stale_scans(FeatureStore.open(growing / "store"), after, OPTIONS) == [changed]
    (growing / "away").rename(folder)
    run(after, growing / "store")
    assert stale_scans(FeatureStore.open(growing / "store"), after, OPTIONS) == []


def test_a_scan_in_whose_place_another_of_its_study_is_used_by_now_is_told(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    run(catalogue, tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store")
    assert unused_scans(store, catalogue) == []
    replaced = usable(catalogue)[2]
    usable_now = pa.array(
        [scan_id != replaced for scan_id in catalogue.scans["scan_id"].to_pylist()]
    )
    column = catalogue.scans.column_names.index("usable")
    scans = catalogue.scans.set_column(column, catalogue.scans.field(column), usable_now)
    assert unused_scans(store, replace(catalogue, scans=scans)) == [replaced]


def test_what_tells_the_files_of_a_scan_is_keyed(growing: Path) -> None:
    catalogue = index([growing / "cohort"], key=bytes(32))
    run(catalogue, growing / "store")
    sources = FeatureStore.open(growing / "store").scans["source"].to_pylist()
    expected = [
        Pseudonyms(bytes(32)).files(catalogue.digests[scan_id]) for scan_id in usable(catalogue)
    ]
    assert sources == expected
    assert len(set(sources)) == 4
    content = b"".join(all_bytes(growing / "store").values())
    assert not any(digest[:16].encode() in content for digest in catalogue.digests.values())


def test_two_processes_that_start_at_once_finish_with_the_bytes_of_one(
    catalogue: Catalogue, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert extract_at_once([catalogue] * 2, store, CONFIG, options=OPTIONS) == [0, 0]
    assert all_bytes(store) == undisturbed
    assert FeatureStore.open(store).verify().ok


def test_two_processes_that_start_at_once_on_object_storage_finish_with_the_bytes_of_one(
    catalogue: Catalogue, undisturbed: dict[str, bytes], bucket: str
) -> None:
    store = f"{bucket}/features/store"
    assert extract_at_once([catalogue] * 2, store, CONFIG, options=OPTIONS) == [0, 0]
    place = place_of(store)
    assert {name: place.read(name) for name, _ in place.files()} == undisturbed


def test_two_processes_with_other_scans_finish_with_one_store_of_all(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    store, halves = tmp_path / "store", (catalogue.scans[:4], catalogue.scans[2:])
    parts = [
        replace(
            catalogue,
            scans=half,
            files={scan_id: catalogue.files[scan_id] for scan_id in half["scan_id"].to_pylist()},
        )
        for half in halves
    ]
    assert extract_at_once(parts, store, CONFIG, options=OPTIONS) == [0, 0]
    found = FeatureStore.open(store)
    assert sorted(found.scans["scan_id"].to_pylist()) == sorted(usable(catalogue))
    assert set(found.scans["status"].to_pylist()) == {"ok"}
    assert found.verify().ok
    for number, part in enumerate(parts):
        run(part, tmp_path / f"alone-{number}")
        alone = FeatureStore.open(tmp_path / f"alone-{number}")
        ids = alone.scans["scan_id"].to_pylist()
        # Shards, and so batches, may be cut elsewhere: equal but for the last bits.
        torch.testing.assert_close(
            found.load(ids)[0].float(), alone.load(ids)[0].float(), rtol=2e-3, atol=2e-3
        )
