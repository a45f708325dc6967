"""Verification: one flipped bit anywhere is found, with the scans that it concerns."""

import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from toy_store import SETTINGS, all_bytes, create, fill, folder, forbid, results_of, to_store

from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.places import LocalPlace
from ctfm.store.plan import STORE_SCHEMA
from ctfm.store.verify import VerifyReport, verify_store

SCANS = [4, 7, 3, 6, 5, 2]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return fill(create(tmp_path / "s", to_store([4, 7, 3, 6, 5])))


def whole_store(path: Path, *, compress: bool) -> Path:
    """Three parts of a plan, failed scans, a chunk no scan uses, a pending shard, an adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctfm.store.plan.CHUNK_BYTES", 40)
        fill(create(path, to_store(SCANS[:4]), compress=compress), failed=["scan001"])
    store = create(path, to_store(SCANS))
    store.record_adapter(max_relative_error=1e-7, scan_ids=["a"], patient_ids=["b"])
    for shard in store.pending_shards():
        store.write_shard(shard, results_of(shard, failed=["scan004"]))
    store.finish()
    create(path, to_store([*SCANS, 5]))
    return path


def verified(path: Path) -> VerifyReport:
    return verify_store(LocalPlace(path))


@pytest.mark.parametrize("file", ["scans.parquet", "plan/000000.parquet", "commits/000000.json"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    store: FeatureStore, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(folder(store) / file, monkeypatch)
    with pytest.raises(PlaceError, match=f"{file} may not be read by this user"):
        verified(folder(store))


def test_a_chunk_that_may_not_be_read_is_not_called_lost(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "cls/c.0.0")

    monkeypatch.setattr(zarr.Array, "__getitem__", refused)
    with pytest.raises(PlaceError, match=r"c\.0\.0 may not be read by this user"):
        verified(folder(store))


def scans_of(store: Path, file: str) -> set[str]:
    """Scans that one file of a store is about; for a chunk, those that use rows of it."""
    lines = FeatureStore.open(store).scans.to_pylist()
    name = Path(file).name
    if file.startswith("commits/"):
        lines = [line for line in lines if line["shard"] == int(name[:-5])]
    elif name.startswith("c."):
        chunk_rows = zarr.open_array(store / Path(file).parent, mode="r").chunks[0]
        low = int(name.split(".")[1]) * chunk_rows
        lines = [
            line
            for line in lines
            if line["row_start"] < low + chunk_rows and line["row_start"] + line["n_rows"] > low
        ]
        lines = [line for line in lines if line["n_rows"]]
    return {line["scan_id"] for line in lines}


@pytest.mark.parametrize("compress", [False, True])
def test_finds_a_flipped_bit_in_every_file_and_names_its_scans(
    tmp_path: Path, compress: bool
) -> None:
    store = whole_store(tmp_path / "s", compress=compress)
    assert verified(store).ok
    rng = random.Random(compress)
    unused = 0
    for file, content in all_bytes(store).items():
        expected = scans_of(store, file)
        offsets = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(2))}
        for offset in offsets:
            flipped = bytearray(content)
            flipped[offset] ^= 1 << rng.randrange(8)
            (store / file).write_bytes(flipped)
            report = verified(store)
            assert file in {problem.where for problem in report.problems}, (file, offset)
            assert expected <= set(report.damaged_scans), (file, offset)
            if expected:
                assert set(report.damaged_scans) == expected, (file, offset)
            else:
                unused += 1
                assert len(report.damaged_scans) == 1, (file, offset)
            assert bool(report.lost_scans) == ("/c." in file), (file, offset)
        (store / file).write_bytes(content)
    assert unused
    assert verified(store).ok


@pytest.mark.slow
def test_finds_a_flipped_bit_in_every_eighth_byte(tmp_path: Path) -> None:
    store = whole_store(tmp_path / "s", compress=False)
    for file, content in all_bytes(store).items():
        for bit in range(0, 8 * len(content), 61):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (store / file).write_bytes(flipped)
            assert file in {problem.where for problem in verified(store).problems}, (file, bit)
        (store / file).write_bytes(content)


def test_every_file_that_is_gone_is_found(tmp_path: Path) -> None:
    store = whole_store(tmp_path / "s", compress=False)
    for file, content in all_bytes(store).items():
        if file == "adapter.json":
            continue  # its settings name no adapter: without one it is whole
        expected = scans_of(store, file)
        (store / file).unlink()
        report = verified(store)
        assert file in {problem.where for problem in report.problems}, file
        assert expected <= set(report.damaged_scans), file
        (store / file).write_bytes(content)
    assert verified(store).ok


def test_the_record_of_an_adapter_that_is_gone_is_found(tmp_path: Path) -> None:
    settings = {**SETTINGS, "backbone_adapter": "0" * 64}
    store = fill(create(tmp_path / "s", to_store([4, 7]), settings=settings))
    (problem,) = store.verify().problems
    assert (problem.where, problem.what[:10]) == ("adapter.json", "is missing")
    store.record_adapter(max_relative_error=0.0, scan_ids=[], patient_ids=[])
    assert store.verify().ok


@pytest.mark.parametrize("chunk", ["cls/c.0.0", "mean/c.0.0", "position_mm/c.0"])
def test_finds_a_chunk_file_that_is_gone_though_zarr_reads_zeros(
    store: FeatureStore, chunk: str
) -> None:
    (folder(store) / "embeddings.zarr" / chunk).unlink()
    report = store.verify()
    assert report.damaged_scans == report.lost_scans == ("scan000", "scan001")
    assert "chunk file is missing" in report.problems[0].what


def test_chunks_of_pending_shards_do_not_count(tmp_path: Path) -> None:
    store = create(tmp_path / "s", to_store([4, 7, 3, 6, 5]))
    first, *rest = store.pending_shards()
    store.write_shard(first, results_of(first))
    last = folder(store) / "embeddings.zarr" / "cls" / "c.2.0"
    last.write_bytes(b"what a kill may leave")
    report = store.verify()
    assert report.ok
    assert report.pending == sum(len(shard.scans) for shard in rest)


def test_finds_a_commit_that_is_gone_and_needs_no_extraction(store: FeatureStore) -> None:
    (folder(store) / "commits" / "000001.json").unlink()
    (problem,) = store.verify().problems
    assert problem.where == "commits/000001.json"
    assert problem.scan_ids
    assert not problem.rows_lost


def test_a_damaged_commit_that_the_table_does_not_have_yet_costs_its_scans(
    tmp_path: Path,
) -> None:
    store = create(tmp_path / "s", to_store([4, 7, 3]))
    first, *_ = store.pending_shards()
    store.write_shard(first, results_of(first))
    (folder(store) / "commits" / "000000.json").write_bytes(b"{}")
    report = store.verify()
    assert report.lost_scans == tuple(scan.scan_id for scan in first.scans)


def test_a_table_that_was_edited_concerns_every_scan_and_costs_none(store: FeatureStore) -> None:
    table = pq.read_table(folder(store) / "scans.parquet")
    rows = pa.array([4, 5, 1, 6, 4], pa.int32())
    pq.write_table(
        table.set_column(5, STORE_SCHEMA.field(5), rows), folder(store) / "scans.parquet"
    )
    report = store.verify()
    assert {problem.where for problem in report.problems} == {"scans.parquet"}
    assert len(report.damaged_scans) == 5
    assert not report.lost_scans


def test_finds_arrays_of_another_shape(store: FeatureStore) -> None:
    zarr.open_array(folder(store) / "embeddings.zarr" / "mean").resize((1, 3))
    (problem,) = store.verify().problems
    assert problem.where == "embeddings.zarr/mean/zarr.json"


@pytest.mark.parametrize(
    "file",
    ["commits/000001.json", "scans.parquet", "plan/000000.parquet", "embeddings.zarr/zarr.json"],
)
def test_finds_the_intact_file_of_another_store(
    store: FeatureStore, tmp_path: Path, file: str
) -> None:
    other = fill(
        create(tmp_path / "other", to_store([9, 9, 9], views=2), settings={"backbone": "other"})
    )
    shutil.copy(folder(other) / file, folder(store) / file)
    assert not verified(folder(store)).ok


def test_counts_what_it_read(tmp_path: Path) -> None:
    store = create(tmp_path / "s", to_store([4, 7, 3, 6, 5]))
    first, *_ = store.pending_shards()
    store.write_shard(first, results_of(first, failed=["scan000"]))
    report = store.verify()
    assert report.ok
    assert (report.scans, report.pending, report.failed) == (5, 5 - len(first.scans), 1)
    assert report.rows == sum(store.scans["n_rows"].to_pylist())
    assert report.bytes_read == first.n_rows * (5 * 2 + 3 * 2 + 4)


def test_loading_a_damaged_chunk_is_an_error_not_other_numbers(store: FeatureStore) -> None:
    chunk = folder(store) / "embeddings.zarr" / "cls" / "c.0.0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match="`ctfm store verify` names the scans"):
        store.load()
