"""Merging: the rows of all stores, checked on the way, whatever is killed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_store import TOKENS, all_bytes, create, fill, folder, results_of, to_store

from ctfm.store.errors import StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.layout import StoredDtype
from ctfm.store.merge import merge_stores

SCANS = to_store([4, 7, 3, 6, 5, 2, 8], views=2)
A, B = SCANS[:8], SCANS[4:]  # scans 0 to 3, and 2 to 6


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two stores, cut into shards in other ways, that have two scans in common."""
    a = fill(create(tmp_path / "a", A, shard_scans=3), failed=["scan001", "scan003"])
    b = fill(create(tmp_path / "b", B, shard_scans=5, compress=True), failed=["scan006"])
    return folder(a), folder(b)


def test_holds_the_rows_of_every_scan_that_is_ok_in_one(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    told: list[int] = []
    merged = merge_stores(pair, tmp_path / "c", shard_scans=4, progress=told.append)
    assert sum(told) == len(SCANS)
    assert merged.verify().ok
    assert merged.info()["scans"] == {"ok": 10, "failed": 4}
    assert merged.fingerprint == FeatureStore.open(pair[0]).fingerprint
    whole = fill(create(tmp_path / "whole", SCANS), failed=["scan001", "scan006"])
    for view in (0, 1):
        for token in TOKENS:
            for mine, theirs in zip(
                merged.load(None, token, view=view), whole.load(None, token, view=view), strict=True
            ):
                assert torch.equal(mine, theirs)
        assert torch.equal(merged.positions(view=view)[0], whole.positions(view=view)[0])
    lines = [line for line in merged.scans.to_pylist() if line["status"] == "failed"]
    assert {(line["scan_id"], line["reason"], line["detail"]) for line in lines} == {
        ("scan001", "not_a_head", "no head"),
        ("scan006", "not_a_head", "no head"),
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_store_merged_alone_is_the_same_to_the_byte(tmp_path: Path, dtype: StoredDtype) -> None:
    store = fill(create(tmp_path / "a", SCANS, dtype=dtype), failed=["scan001"])
    store.record_adapter(max_relative_error=1e-7, scan_ids=["a"], patient_ids=["b"])
    store.record_weights(hub_id="of/someone", commit="0" * 40)
    merge_stores([folder(store)], tmp_path / "c", shard_scans=2)
    assert all_bytes(tmp_path / "c") == all_bytes(folder(store))


def test_what_an_adapter_was_trained_on_is_never_forgotten(tmp_path: Path) -> None:
    one, other = (fill(create(tmp_path / name, SCANS)) for name in "ab")
    one.record_adapter(max_relative_error=1e-7, scan_ids=[], patient_ids=[])
    other.record_adapter(max_relative_error=1e-7, scan_ids=["s"], patient_ids=["p"])
    merge_stores([folder(one), folder(other)], tmp_path / "c")
    for store in (FeatureStore.open(tmp_path / "c"), other):
        store.record_adapter(max_relative_error=1e-7, scan_ids=["t"], patient_ids=[])
        assert store.adapter is not None
        assert (store.adapter["scan_ids"], store.adapter["patient_ids"]) == (["s", "t"], ["p"])


def test_merging_again_changes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge_stores(pair, tmp_path / "c")
    before = all_bytes(tmp_path / "c")
    told: list[int] = []
    merge_stores(pair, tmp_path / "c", progress=told.append)
    merge_stores(pair[::-1], tmp_path / "c", progress=told.append)
    assert told == []
    assert all_bytes(tmp_path / "c") == before


def test_a_kill_leaves_an_unfinished_store_that_merging_again_completes(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    merge_stores(pair, tmp_path / "whole", shard_scans=4)

    def killed(n_scans: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_stores(pair, tmp_path / "c", shard_scans=4, progress=killed)
    store = FeatureStore.open(tmp_path / "c")
    assert store.verify().ok
    with pytest.raises(StoreError, match="still pending"):
        store.load()
    merge_stores(pair, tmp_path / "c", shard_scans=4)
    assert all_bytes(tmp_path / "c") == all_bytes(tmp_path / "whole")


def test_sites_with_keys_of_their_own_are_merged_and_each_may_add_to_it(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for path, key in zip(pair, ("k1", "k2"), strict=True):
        FeatureStore.open(path).record_ids([key])
    merged = merge_stores(pair, tmp_path / "c")
    assert merged.ids == ("k1", "k2")
    create(tmp_path / "c", A, ids="k2")
    with pytest.raises(StoreError, match="k1, k2, of this catalogue k3"):
        create(tmp_path / "c", A, ids="k3")
    assert merged.verify().ok


def test_a_store_may_be_merged_into_one_of_the_sources(pair: tuple[Path, Path]) -> None:
    a, b = pair
    before = FeatureStore.open(a).load(["scan000", "scan002"])[0]
    merged = merge_stores([a, b], a)
    assert merged.verify().ok
    assert torch.equal(merged.load(["scan000", "scan002"])[0], before)
    assert set(merged.scans["scan_id"].to_pylist()) == {scan.scan_id for scan in SCANS}


def test_rows_that_are_damaged_are_not_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    chunk = a / "embeddings.zarr" / "cls" / "c.0.0"
    chunk.write_bytes((b / "embeddings.zarr" / "cls" / "c.0.0").read_bytes())
    with pytest.raises(StoreError, match=r"damaged|are not those that were committed"):
        merge_stores(pair, tmp_path / "c")
    assert "ok" not in FeatureStore.open(tmp_path / "c").scans["status"].to_pylist()


def test_rows_of_another_scan_with_a_good_checksum_are_not_copied(tmp_path: Path) -> None:
    a = fill(create(tmp_path / "a", to_store([4, 7]), shard_scans=1))
    cls = folder(a) / "embeddings.zarr" / "cls"
    (cls / "c.0.0").write_bytes((cls / "c.1.0").read_bytes())
    with pytest.raises(StoreError, match=r"'scan000' .* are not those that were committed"):
        merge_stores([folder(a)], tmp_path / "c")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"settings": {"backbone": "other"}}, 'backbone: "intensity" in the store, "other" now'),
        ({"tokens": {"cls": 5}}, "tokens.mean"),
        ({"dtype": "float32"}, "dtype"),
    ],
)
def test_stores_of_other_settings_are_refused_by_name(
    tmp_path: Path, other: dict[str, Any], sentence: str
) -> None:
    create(tmp_path / "a", A)
    create(tmp_path / "b", B, **other)
    with pytest.raises(StoreError, match="rows of two settings do not mix") as refused:
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert sentence in str(refused.value)
    assert not (tmp_path / "c").exists()


def test_a_scan_with_other_rows_in_two_stores_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = create(tmp_path / "other", to_store([4, 7, 2], views=2), shard_scans=6)
    (shard,) = other.pending_shards()
    results = results_of(shard)
    rows = next(one.rows for one in results if one.scan_id == "scan000")
    assert rows is not None
    rows["cls"] += 1
    other.write_shard(shard, results)
    other.finish()
    with pytest.raises(StoreError, match="scan 'scan000' has other rows in"):
        merge_stores([pair[0], tmp_path / "other"], tmp_path / "c")
    merge_stores(pair, tmp_path / "c")
    with pytest.raises(StoreError, match="scan 'scan000' has other rows in"):
        merge_stores([tmp_path / "other"], tmp_path / "c")


def test_an_unfinished_store_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    create(tmp_path / "a", to_store([4, 7, 3, 6, 5, 2, 8, 9], views=2))
    with pytest.raises(StoreError, match=r"2 scans are still pending, e\.g\. 'scan007'"):
        merge_stores([tmp_path / "a", pair[1]], tmp_path / "c")


def test_a_result_with_pending_scans_of_its_own_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    create(tmp_path / "c", to_store([4] * 9)[8:])
    before = all_bytes(tmp_path / "c")
    with pytest.raises(StoreError, match=r"pending scans that none .* e\.g\. 'scan008'"):
        merge_stores(pair, tmp_path / "c")
    assert all_bytes(tmp_path / "c") == before


def test_a_scan_of_another_patient_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (scan,) = to_store([4])
    moved = type(scan)(scan_id="scan000", study_id="study000", patient_id="x", max_rows=4)
    fill(create(tmp_path / "b2", [moved]))
    with pytest.raises(StoreError, match="has patient_id 'patient000' and 'x'"):
        merge_stores([pair[0], tmp_path / "b2"], tmp_path / "c")
