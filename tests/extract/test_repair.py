"""Repair: just the scans whose rows are lost are read again, and the bytes are those of before."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zarr
from toy_store import all_bytes

from ctfm.extract import readers, repair
from ctfm.extract.backbone import Backbone
from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import extract
from ctfm.extract.readers import ReadJob
from ctfm.extract.repair import Repaired, Source, repair_store
from ctfm.store.catalogue import Catalogue, read_catalogue
from ctfm.store.features import FeatureStore
from ctfm.store.places import LocalPlace
from ctfm.store.verify import verify_store

CONFIG = ExtractConfig(backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37, views=2)
OPTIONS = Options(batch_size=13, workers=0, shard_scans=4)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder / "cohort", scans=6, seed=1, matrix=64, slices=9, extras=0.0)
    index([folder / "cohort"], key=bytes(32)).write(folder / "scans.parquet")
    return folder / "scans.parquet"


@pytest.fixture(scope="module")
def catalogue(scans: Path) -> Catalogue:
    """The second scan cannot be read."""
    found = read_catalogue(scans)
    lost = found.scans["scan_id"].to_pylist()[1]
    Path(found.files[lost][3]).unlink()
    return found


@pytest.fixture(scope="module")
def whole(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with several chunks a shard."""
    store = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctfm.store.plan.CHUNK_BYTES", 40 * 528 * 2)
        extract(catalogue, store, get_backbone("intensity"), config=CONFIG, options=OPTIONS)
    return store


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def damage_rows_of(store: Path, scan_id: str) -> None:
    """Flip a bit in the first chunk that holds rows of a scan."""
    lines = FeatureStore.open(store).scans.to_pylist()
    (row, *_) = [line["row_start"] for line in lines if line["scan_id"] == scan_id]
    cls = store / "embeddings.zarr" / "cls"
    chunk = cls / f"c.{row // zarr.open_array(cls, mode='r').chunks[0]}.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 2
    chunk.write_bytes(content)


def repaired(store: Path, scans: Path, options: Options = OPTIONS) -> Repaired:
    report = verify_store(LocalPlace(store))
    return repair_store(store, report, Source(scans=scans, options=options))


def test_only_lost_scans_are_read_and_the_bytes_are_those_of_before(
    whole: Path, store: Path, scans: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = catalogue.scans["scan_id"].to_pylist()
    for scan_id in (ids[2], ids[5]):
        damage_rows_of(store, scan_id)
    lost = verify_store(LocalPlace(store)).lost_scans
    assert {ids[2], ids[5]} <= set(lost) < set(ids)
    asked: list[str] = []
    real = readers.read_ahead

    def recorded(jobs: list[ReadJob], *args: object, **kwargs: object) -> object:
        asked.extend(job.scan_id for job in jobs)
        return real(jobs, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(repair, "read_ahead", recorded)
    done = repaired(store, scans)
    assert sorted(asked) == sorted(done.restored) == list(lost)
    assert (done.shards, done.left) == (0, ())
    assert all_bytes(store) == all_bytes(whole)


class Batchwise(torch.nn.Module):
    """A backbone whose rows tell the size of their batch and their place in it."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = get_backbone("intensity").module(pixels)["cls"]
        return {"cls": rows + len(pixels) + torch.arange(len(pixels))[:, None] / 64}


def test_the_batches_are_those_of_before(
    scans: Path, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = replace(get_backbone("intensity"), module=Batchwise())
    monkeypatch.setattr("ctfm.store.plan.CHUNK_BYTES", 40 * 528 * 2)
    extract(catalogue, tmp_path / "store", backbone, config=CONFIG, options=OPTIONS)
    before = all_bytes(tmp_path / "store")
    shard, *_ = FeatureStore.open(tmp_path / "store").shards()
    damage_rows_of(tmp_path / "store", shard.scan_ids()[-1])
    monkeypatch.setattr("ctfm.extract.recorded.get_backbone", lambda *_, **__: backbone)
    assert 0 < len(repaired(tmp_path / "store", scans).restored) < len(shard.scan_ids())
    assert all_bytes(tmp_path / "store") == before


class Otherwise(torch.nn.Module):
    """The backbone on a device that rounds otherwise."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"cls": get_backbone("intensity").module(pixels)["cls"] * 1.01}


def rounding_otherwise(*_: object, **__: object) -> Backbone:
    return replace(get_backbone("intensity"), module=Otherwise())


def test_a_shard_is_not_done_again_if_one_of_its_good_scans_cannot_be_read_any_more(
    store: Path, scans: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = FeatureStore.open(store).shards()[1]
    damaged, good = shard.scan_ids()[:2]
    damage_rows_of(store, damaged)
    before = all_bytes(store)
    folder = Path(catalogue.files[good][0]).parent
    folder.rename(folder.with_name("away"))
    monkeypatch.setattr("ctfm.extract.recorded.get_backbone", rounding_otherwise)
    try:
        done = repaired(store, scans)
    finally:
        folder.with_name("away").rename(folder)
    (sentence,) = done.left
    assert "came out otherwise" in sentence
    assert good in sentence
    assert (done.restored, done.shards) == ((), 0)
    assert all_bytes(store) == before


def test_other_rows_than_before_are_not_written_but_the_shard_is_done_again(
    whole: Path,
    store: Path,
    scans: Path,
    catalogue: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage_rows_of(store, catalogue.scans["scan_id"][5].as_py())
    monkeypatch.setattr("ctfm.extract.recorded.get_backbone", rounding_otherwise)
    done = repaired(store, scans)
    assert (done.restored, done.shards, done.left) == ((), 1, ())
    assert verify_store(LocalPlace(store)).ok
    extract(catalogue, store, get_backbone("intensity"), config=CONFIG, options=OPTIONS)
    assert all_bytes(store) == all_bytes(whole)


def test_a_scan_that_cannot_be_read_any_more_costs_no_other(
    store: Path, scans: Path, catalogue: Catalogue
) -> None:
    scan_id = catalogue.scans["scan_id"][5].as_py()
    damage_rows_of(store, scan_id)
    before = all_bytes(store)
    folder = Path(catalogue.files[scan_id][0]).parent
    folder.rename(folder.with_name("away"))
    try:
        done = repaired(store, scans)
    finally:
        folder.with_name("away").rename(folder)
    (sentence,) = done.left
    assert "vanished, a source file is gone" in sentence
    assert (done.restored, done.shards) == ((), 0)
    assert all_bytes(store) == before


def test_without_a_catalogue_it_mends_what_it_can_and_says_what_is_left(
    store: Path, catalogue: Catalogue, tmp_path: Path
) -> None:
    damage_rows_of(store, catalogue.scans["scan_id"][5].as_py())
    (store / "embeddings.zarr" / "zarr.json").unlink()
    done = repaired(store, tmp_path / "nowhere.parquet")
    assert done.rebuilt == ("embeddings.zarr/zarr.json",)
    (sentence,) = done.left
    assert sentence.startswith("rows of ")
    assert "no catalogue is at" in sentence
