"""A dry run says what is left and what it will take, and writes nothing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ctfm.extract.backbones import get_backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.estimate import estimate
from ctfm.extract.index import index
from ctfm.extract.options import Options
from ctfm.extract.phantom_cohort import write_cohort
from ctfm.extract.pipeline import Target, extract_all
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.reasons import Reason

CONFIG = ExtractConfig(
    backbone="intensity", size_px=56, in_plane_mm=4.0, max_slices=37, views=2, dtype="float32"
)
OPTIONS = Options(workers=0, shard_scans=2)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    write_cohort(folder, scans=5, seed=3, matrix=64, slices=9, extras=0.0)
    return index([folder], key=bytes(32))


def target(store: Path) -> Target:
    return Target(backbone=get_backbone("intensity"), config=CONFIG, store=store)


def test_counts_scans_rows_and_bytes_and_writes_nothing(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    found = estimate(catalogue, target(tmp_path / "store"), options=OPTIONS)
    n_scans = catalogue.scans["usable"].to_pylist().count(True)
    assert found.scans == n_scans
    assert found.rows == n_scans * 2 * 37
    assert found.disk_bytes == found.rows * (528 * 4 + 4)
    assert min(found.read_s, found.embed_s, found.seconds) > 0
    assert not list(tmp_path.iterdir())


def test_counts_only_what_is_left(catalogue: Catalogue, tmp_path: Path) -> None:
    half = replace(catalogue, scans=catalogue.scans.slice(0, 3))
    extract_all(half, [target(tmp_path / "store")], options=OPTIONS)
    before = FeatureStore.open(tmp_path / "store").scans
    found = estimate(catalogue, target(tmp_path / "store"), options=OPTIONS)
    assert found.scans == catalogue.scans["usable"].to_pylist().count(True) - 3
    assert FeatureStore.open(tmp_path / "store").scans.equals(before)


def test_counts_what_an_extraction_would_do_again(catalogue: Catalogue, tmp_path: Path) -> None:
    """A scan whose files have changed costs its shard, unless another of it cannot be read."""
    one_view = replace(target(tmp_path / "store"), config=replace(CONFIG, views=1))
    (done,) = extract_all(catalogue, [one_view], options=OPTIONS)
    shard = done.store.shards()[0]
    first, second = shard.scan_ids()
    changed = replace(catalogue, digests={**catalogue.digests, first: "0" * 64})
    found = estimate(changed, one_view, options=OPTIONS)
    assert found.scans == len(shard.scan_ids())
    assert found.rows == sum(scan.max_rows for scan in shard.scans)
    blocked = replace(changed, files={**changed.files, second: ["/nowhere.dcm"]})
    assert estimate(blocked, one_view, options=OPTIONS).scans == 0


def test_refuses_a_store_of_other_settings(catalogue: Catalogue, tmp_path: Path) -> None:
    extract_all(catalogue, [target(tmp_path / "store")], options=OPTIONS)
    other = replace(target(tmp_path / "store"), config=replace(CONFIG, slice_mm=5.0))
    with pytest.raises(StoreError, match=r"slice_mm: 4.* in the store, 5.* now"):
        estimate(catalogue, other, options=OPTIONS)


def test_says_why_a_scan_of_the_probe_cannot_be_used(catalogue: Catalogue, tmp_path: Path) -> None:
    gone = {scan_id: ["/nowhere.dcm"] for scan_id in catalogue.files}
    found = estimate(replace(catalogue, files=gone), target(tmp_path / "store"), options=OPTIONS)
    assert {error.reason for error in found.failed} == {Reason.VANISHED}
    assert found.tried == len(found.failed)
    assert math.isnan(found.seconds)
