"""Extraction end to end: what is in the store, what a failure leaves, what a kill leaves."""

import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import zarr

from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import Progress, Target, create_store, extract, extract_all
from ctfm.extract.prepare import prepare
from ctfm.extract.remaining import scans_of_others
from ctfm.store.catalogue import Catalogue, read_catalogue
from ctfm.store.errors import BackboneError, ConfigError, StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.pseudonyms import Pseudonyms
from ctfm.store.reasons import Reason

SCANS = 9
CONFIG = ExtractConfig(backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """A catalogue of small phantoms, one of which has lost a file since it was indexed."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder / "cohort", scans=SCANS, seed=1, matrix=64, slices=9)
    index([folder / "cohort"], key=bytes(32)).write(folder / "scans.parquet")
    found = read_catalogue(folder / "scans.parquet")
    Path(found.files[lost_scan(found)][3]).unlink()
    return found


def usable(catalogue: Catalogue) -> list[str]:
    lines = catalogue.scans.select(["scan_id", "usable"]).to_pylist()
    return [line["scan_id"] for line in lines if line["usable"]]


def lost_scan(catalogue: Catalogue) -> str:
    return usable(catalogue)[4]


def run(catalogue: Catalogue, store: Path, config: ExtractConfig = CONFIG, **options: Any) -> None:
    how = {"batch_size": 13, "workers": 0, "shard_scans": 2, **options}
    extract_all(catalogue, [target(store, config)], options=Options(**how))


def only(catalogue: Catalogue, scan_ids: Sequence[str]) -> Catalogue:
    """A catalogue that lists nothing but some scans of another."""
    listed = pa.array(scan_ids)
    return replace(
        catalogue,
        scans=catalogue.scans.filter(pc.is_in(catalogue.scans["scan_id"], value_set=listed)),
        files={scan_id: catalogue.files[scan_id] for scan_id in scan_ids},
    )


def target(store: Path, config: ExtractConfig = CONFIG) -> Target:
    return Target(backbone=get_backbone(config.backbone), config=config, store=store)


def fill(catalogue: Catalogue, *targets: Target) -> int:
    """Fill some stores in one call; the number of scans that were read."""
    read: list[int] = []
    options = Options(batch_size=13, workers=0, shard_scans=2)
    extract_all(catalogue, targets, options=options, progress=Progress(planned=read.append))
    (planned,) = read
    return planned


def contents(store: Path) -> dict[str, bytes]:
    """Every array of a store, and its table, as bytes."""
    group = zarr.open_group(str(store / "embeddings.zarr"), mode="r")
    arrays = {name: np.asarray(array[:]).tobytes() for name, array in group.arrays()}
    return {**arrays, "scans.parquet": (store / "scans.parquet").read_bytes()}


@pytest.fixture(scope="module")
def undisturbed(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("undisturbed") / "intensity"
    run(catalogue, store)
    return store


def test_every_usable_scan_has_a_line_and_only_the_broken_one_failed(
    catalogue: Catalogue, undisturbed: Path
) -> None:
    lines = FeatureStore.open(undisturbed).scans.to_pylist()
    assert [line["scan_id"] for line in lines] == usable(catalogue)
    failed = {line["scan_id"]: line["reason"] for line in lines if line["status"] != "ok"}
    assert failed == {lost_scan(catalogue): Reason.VANISHED.value}


def test_rows_are_those_of_the_backbone_on_the_prepared_scan(
    catalogue: Catalogue, undisturbed: Path
) -> None:
    scan_id = usable(catalogue)[6]
    backbone = get_backbone("intensity")
    (scan,) = prepare(catalogue.files[scan_id], CONFIG, scan_id=scan_id)
    channels = backbone.channels(torch.from_numpy(scan.hu), CONFIG.windows_hu)
    store = FeatureStore.open(undisturbed)
    rows, offsets = store.load([scan_id])
    assert offsets.tolist() == [0, len(scan.hu)]
    torch.testing.assert_close(rows.float(), backbone.embed(channels)["cls"], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(store.positions([scan_id])[0].numpy(), scan.position_mm)


def test_reader_processes_change_no_byte(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    run(catalogue, tmp_path / "store", workers=2)
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_running_again_does_nothing(catalogue: Catalogue, undisturbed: Path) -> None:
    before = contents(undisturbed)
    planned: list[int] = []
    extract_all(catalogue, [target(undisturbed)], progress=Progress(planned=planned.append))
    assert planned == [0]
    assert contents(undisturbed) == before


def test_a_catalogue_that_has_grown_is_appended(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    small = replace(catalogue, scans=catalogue.scans.slice(0, catalogue.scans.num_rows // 2))
    run(small, tmp_path / "store")
    run(catalogue, tmp_path / "store")
    grown, whole = FeatureStore.open(tmp_path / "store"), FeatureStore.open(undisturbed)
    ids = [scan_id for scan_id in usable(catalogue) if scan_id != lost_scan(catalogue)]
    # Shards, and so batches, are cut elsewhere: equal but for the last bits.
    torch.testing.assert_close(grown.load(ids)[0], whole.load(ids)[0], rtol=2e-3, atol=2e-3)


def test_ids_of_another_key_are_refused_before_anything_is_planned(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    small = replace(catalogue, scans=catalogue.scans.slice(0, catalogue.scans.num_rows // 2))
    run(small, tmp_path / "store")
    before = FeatureStore.open(tmp_path / "store")
    with pytest.raises(StoreError, match="made with another key"):
        run(replace(catalogue, key=bytes(31) + b"1"), tmp_path / "store")
    after = FeatureStore.open(tmp_path / "store")
    assert after.scans.equals(before.scans)
    assert after.ids == (Pseudonyms(catalogue.key).fingerprint,)
    assert catalogue.key is None or catalogue.key.hex() not in after.ids[0]


def test_shards_with_scans_that_the_catalogue_does_not_list_are_left_to_others_until_written_off(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run(catalogue, store, task=(0, 3))
    some = only(catalogue, usable(catalogue)[:3])  # shards of two: the second is half known
    run(some, store)
    lines = FeatureStore.open(store).scans.to_pylist()
    first, second, third = usable(catalogue)[:3]
    status = {line["scan_id"]: line["status"] for line in lines}
    assert (status[first], status[second], status[third]) == ("ok", "ok", "pending")
    assert third in scans_of_others(FeatureStore.open(store), some)
    assert not {line["reason"] for line in lines} - {"ok", ""}
    shutil.copytree(store, tmp_path / "other")
    run(catalogue, store)
    assert contents(store) == contents(undisturbed)
    run(some, tmp_path / "other", write_off_unlisted=True)
    lines = FeatureStore.open(tmp_path / "other").scans.to_pylist()
    reasons = {line["scan_id"]: line["reason"] for line in lines}
    assert reasons[third] == "ok"
    assert set(reasons.values()) == {"ok", "vanished"}
    assert scans_of_others(FeatureStore.open(tmp_path / "other"), some) == []


def test_what_failed_in_a_shard_with_scans_of_another_catalogue_is_not_taken_back(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "store")
    some = only(catalogue, [lost_scan(catalogue)])
    extract(
        some,
        tmp_path / "store",
        get_backbone("intensity"),
        config=CONFIG,
        options=Options(batch_size=13, workers=0),
        retry_failed=True,
    )
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_files_that_another_patient_took_the_place_of_are_not_embedded(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    other, scan = usable(catalogue)[1:3]
    for i, file in enumerate(catalogue.files[other]):
        shutil.copy(file, tmp_path / f"{i}.dcm")
    replaced = {**catalogue.files, scan: [str(file) for file in tmp_path.iterdir()]}
    run(replace(catalogue, files=replaced), tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store")
    failed = {
        line["scan_id"]: line["reason"]
        for line in store.scans.to_pylist()
        if line["status"] == "failed"
    }
    assert failed == {scan: "changed", lost_scan(catalogue): "vanished"}


def test_other_settings_are_refused_by_name(catalogue: Catalogue, undisturbed: Path) -> None:
    with pytest.raises(StoreError, match="slice_mm"):
        run(catalogue, undisturbed, replace(CONFIG, slice_mm=5.0))


def test_a_scan_that_failed_is_tried_again_on_request(catalogue: Catalogue, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(catalogue, store)
    lost, other = lost_scan(catalogue), usable(catalogue)[0]
    mended = replace(
        catalogue,
        files={**catalogue.files, lost: catalogue.files[other]},
        digests={**catalogue.digests, lost: catalogue.digests[other]},
    )
    extract_all(mended, [target(store)], retry_failed=True)
    assert FeatureStore.open(store).info()["scans"] == {"ok": len(usable(catalogue))}


def test_a_damaged_chunk_is_extracted_again_to_the_same_bytes(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "store")
    chunk = tmp_path / "store" / "embeddings.zarr" / "cls" / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 4
    chunk.write_bytes(content)
    store = FeatureStore.open(tmp_path / "store")
    damaged = store.verify().damaged_scans
    assert damaged
    assert store.take_back(damaged) == 1
    reads: list[int] = []
    reads.append(fill(catalogue, target(tmp_path / "store")))
    assert reads == [2]
    assert contents(tmp_path / "store") == contents(undisturbed)
    assert FeatureStore.open(tmp_path / "store").verify().ok


def test_every_view_of_a_scan_is_stored_and_differs(catalogue: Catalogue, tmp_path: Path) -> None:
    run(catalogue, tmp_path / "store", replace(CONFIG, views=2))
    store = FeatureStore.open(tmp_path / "store")
    scan_id = usable(catalogue)[0]
    clean, augmented = (store.load([scan_id], view=view)[0] for view in (0, 1))
    assert clean.shape != augmented.shape or not torch.equal(clean, augmented)


class Broken(torch.nn.Module):
    """A backbone that returns NaN for slices that hold bone."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = torch.ones(len(pixels), 528)
        rows[pixels.amax(dim=(1, 2, 3)) > 500] = torch.nan
        return {"cls": rows}


def test_embeddings_that_are_not_finite_are_a_reason_not_a_row(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    backbone = replace(get_backbone("intensity"), module=Broken(), tokens={"cls": 528})
    extract(catalogue, tmp_path / "store", backbone, config=CONFIG)
    store = FeatureStore.open(tmp_path / "store")
    found = set(store.info()["failures"])
    assert found == {Reason.NOT_FINITE_EMBEDDING.value, Reason.VANISHED.value}


def test_several_stores_filled_in_one_pass_are_those_of_a_pass_each(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    float32 = replace(CONFIG, dtype="float32")
    reads: list[int] = []
    reads.append(fill(catalogue, target(tmp_path / "a"), target(tmp_path / "b", float32)))
    run(catalogue, tmp_path / "alone", float32)
    assert reads == [len(usable(catalogue))]
    assert contents(tmp_path / "a") == contents(undisturbed)
    assert contents(tmp_path / "b") == contents(tmp_path / "alone")


def test_stores_of_which_one_is_ahead_still_share_the_reading_of_what_both_lack(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    """As a kill between the commits of a shard leaves them."""
    float32 = replace(CONFIG, dtype="float32")
    run(catalogue, tmp_path / "alone", float32)
    shutil.copytree(undisturbed, tmp_path / "a")
    shutil.copytree(tmp_path / "alone", tmp_path / "b")
    first, *both = usable(catalogue)[:5]
    FeatureStore.open(tmp_path / "a").take_back(both)
    FeatureStore.open(tmp_path / "b").take_back([first, *both])
    reads: list[int] = []
    reads.append(fill(catalogue, target(tmp_path / "a"), target(tmp_path / "b", float32)))
    assert reads == [6]  # three shards of two: the first holds one scan of `both`
    assert contents(tmp_path / "a") == contents(undisturbed)
    assert contents(tmp_path / "b") == contents(tmp_path / "alone")
    FeatureStore.open(tmp_path / "a").take_back(usable(catalogue)[3:])
    FeatureStore.open(tmp_path / "b").take_back(usable(catalogue))
    reads.append(fill(catalogue, target(tmp_path / "a"), target(tmp_path / "b", float32)))
    assert reads[1] == len(usable(catalogue))
    assert contents(tmp_path / "a") == contents(undisturbed)
    assert contents(tmp_path / "b") == contents(tmp_path / "alone")


def test_the_commit_that_weights_are_from_is_kept_and_changes_no_fingerprint(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    """The same weights may lie in another place: their digest is what decides."""
    local = target(tmp_path / "a")
    entry = replace(local.backbone.entry, hub_id="org/intensity")
    backbone = replace(local.backbone, entry=entry, commit="4" * 40)
    options = Options(workers=0, shard_scans=2)
    store = create_store(catalogue, replace(local, backbone=backbone), options=options)
    assert store.weights == {"hub_id": "org/intensity", "commit": "4" * 40}
    assert FeatureStore.open(undisturbed).weights is None
    assert store.fingerprint == FeatureStore.open(undisturbed).fingerprint


def test_stores_that_prepare_scans_in_other_ways_get_a_pass_each(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    unaligned = replace(CONFIG, align="none")
    reads: list[int] = []
    reads.append(fill(catalogue, target(tmp_path / "a"), target(tmp_path / "b", unaligned)))
    assert reads == [2 * len(usable(catalogue))]
    assert contents(tmp_path / "a") == contents(undisturbed)


def test_two_targets_cannot_share_a_store(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store of its own"):
        extract_all(catalogue, [target(tmp_path / "a"), target(tmp_path / "a")])


def test_the_tasks_of_an_array_together_fill_the_store_with_the_same_bytes(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    for number in (2, 0, 1):
        run(catalogue, tmp_path / "store", task=(number, 3))
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_a_task_that_tries_failed_scans_again_leaves_those_of_other_tasks(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run(catalogue, store)
    planned: list[int] = []
    for number in (0, 1):
        extract_all(
            catalogue,
            [target(store)],
            options=Options(batch_size=13, workers=0, task=(number, 2)),
            retry_failed=True,
            progress=Progress(planned=planned.append),
        )
    assert planned == [2, 0]
    assert set(FeatureStore.open(store).info()["scans"]) == {"ok", "failed"}


@pytest.mark.parametrize("task", [(3, 3), (-1, 2), (0, 0)])
def test_a_task_that_is_not_one_of_the_array_is_refused(task: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="0 to n - 1"):
        Options(task=task)


class Small(torch.nn.Module):
    """A backbone on a device that holds five slices; it keeps how many were tried at once."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[int] = []

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.tried.append(len(pixels))
        if len(pixels) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return {"cls": get_backbone("intensity").module(pixels)["cls"]}


def test_out_of_device_memory_halves_the_batch_and_goes_on(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    backbone = replace(get_backbone("intensity"), module=Small())
    options = Options(batch_size=13, workers=0, shard_scans=2)
    done = extract(catalogue, tmp_path / "store", backbone, config=CONFIG, options=options)
    assert (done.first_batch_size, done.batch_size) == (13, 3)
    rows, expected = (
        FeatureStore.open(path).load(None)[0] for path in (done.store.path, undisturbed)
    )
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)


def test_a_batch_that_did_not_fit_is_not_tried_again(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path
) -> None:
    module = Small()
    backbone = replace(get_backbone("intensity"), module=module)
    options = Options(batch_size=13, workers=0, shard_scans=2)
    extract(catalogue, tmp_path / "store", backbone, config=CONFIG, options=options)
    assert [size for size in module.tried if size > 3] == [13, 6]
    n_rows = FeatureStore.open(undisturbed).load(None)[0].shape[0]
    assert sum(module.tried) - 13 - 6 == n_rows


class Full(torch.nn.Module):
    """A backbone that fits into no memory."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("out of memory")


def test_a_backbone_too_large_for_the_device_is_said_so(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    backbone = replace(get_backbone("intensity"), module=Full())
    with pytest.raises(BackboneError, match="one slice at a time"):
        extract(catalogue, tmp_path / "store", backbone, config=CONFIG)


def test_a_device_that_has_no_room_for_the_next_scan_embeds_what_waits_and_goes_on(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = Backbone.channels, 0

    def every_other_time(backbone: Backbone, *arguments: Any) -> torch.Tensor:
        nonlocal refused
        refused += 1
        if refused % 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(backbone, *arguments)

    monkeypatch.setattr(Backbone, "channels", every_other_time)
    options = Options(batch_size=500, workers=0, shard_scans=2)
    backbone = get_backbone("intensity")
    done = extract(catalogue, tmp_path / "store", backbone, config=CONFIG, options=options)
    assert done.batch_size < done.first_batch_size == 500
    rows, expected = (
        FeatureStore.open(path).load(None)[0] for path in (done.store.path, undisturbed)
    )
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)


def test_samples_that_cannot_be_put_together_are_embedded_as_they_are(
    catalogue: Catalogue, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        if len(tensors) > 1 and dim == 0 and tensors[0].ndim == 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(tensors, dim=dim)

    real = torch.cat
    monkeypatch.setattr(torch, "cat", full)
    run(catalogue, tmp_path / "store", batch_size=40)
    rows, expected = (
        FeatureStore.open(path).load(None)[0] for path in (tmp_path / "store", undisturbed)
    )
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)


def test_a_scan_too_large_for_what_the_device_has_left_is_said_so(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Backbone, "channels", full)
    with pytest.raises(BackboneError, match="one scan does not fit into the memory"):
        extract(catalogue, tmp_path / "store", get_backbone("intensity"), config=CONFIG)


def test_a_catalogue_without_usable_scans_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    empty = replace(catalogue, scans=catalogue.scans.slice(0, 0))
    with pytest.raises(ConfigError, match="none of the 0 scans"):
        run(empty, tmp_path / "store")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_twenty_random_moments_and_resumed_it_gives_the_same_bytes(
    catalogue: Catalogue, tmp_path: Path, workers: int
) -> None:
    run(catalogue, tmp_path / "undisturbed", shard_scans=1)
    expected = contents(tmp_path / "undisturbed")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["ctfm.extract.pipeline", "ctfm.extract.backbones"])
    rng = random.Random(0)
    kills, attempt = 0, 0
    while kills < 20:
        attempt += 1
        store = tmp_path / f"killed-{attempt}"
        while not _survives(catalogue, store, forkserver, workers=workers, rng=rng):
            kills += 1
        assert contents(store) == expected, f"after {kills} kills"
        assert FeatureStore.open(store).verify().ok
    shutil.rmtree(tmp_path, ignore_errors=True)


def _survives(
    catalogue: Catalogue,
    store: Path,
    context: multiprocessing.context.ForkServerContext,
    *,
    workers: int,
    rng: random.Random,
) -> bool:
    """Extract in a process, and kill it; whether it had finished before.

    The moment is at random after the start or, so that it goes on at any speed of the machine,
    after a commit.
    """
    options = Options(batch_size=13, workers=workers, shard_scans=1)
    process = context.Process(
        target=extract,
        args=(catalogue, store, get_backbone("intensity")),
        kwargs={"config": CONFIG, "options": options},
    )
    awaited = _commits(store) + rng.randint(0, 1)
    process.start()
    while process.is_alive() and _commits(store) < awaited:
        time.sleep(0.002)
    process.join(rng.uniform(0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "it ended by itself, with an error"
    return process.exitcode == 0


def _commits(store: Path) -> int:
    return len(list((store / "commits").glob("0*.json")))
