"""Exports: read by each format's own reader, they hold what `load` gives."""

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_store import TOKENS, create, fill, folder, to_store

from ctfm.store.errors import ConfigError, StoreError
from ctfm.store.export import export_store
from ctfm.store.features import FeatureStore
from ctfm.store.layout import StoredDtype

FORMATS = ["parquet", "npy", "h5", "hf-dataset"]


def made(path: Path, dtype: StoredDtype = "float16") -> FeatureStore:
    """Shards with a failed scan, and one of failed scans alone."""
    scans = to_store([4, 7, 3, 6, 5, 2, 8], views=2)
    return fill(create(path, scans, dtype=dtype, shard_scans=4), failed=["scan001", "scan006"])


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return made(tmp_path / "s")


def expected_lines(store: FeatureStore) -> list[dict[str, Any]]:
    """A line a slice, made from what `load` and `positions` give."""
    lines = []
    for scan in store.scans.filter(pa.compute.equal(store.scans["status"], "ok")).to_pylist():
        ids, view = [scan["scan_id"]], scan["view"]
        tokens = {name: store.load(ids, name, view=view)[0].float().numpy() for name in TOKENS}
        for i, position_mm in enumerate(store.positions(ids, view=view)[0].tolist()):
            names = ("scan_id", "study_id", "patient_id", "view")
            line = {name: scan[name] for name in names} | {"slice": i, "position_mm": position_mm}
            lines.append(line | {name: rows[i].tolist() for name, rows in tokens.items()})
    return lines


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_parquet_has_a_line_a_slice(tmp_path: Path, dtype: StoredDtype) -> None:
    store = made(tmp_path / "s", dtype)
    n_rows = export_store(store, tmp_path / "rows.parquet", to="parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.to_pylist() == expected_lines(store)
    assert n_rows == table.num_rows
    about = json.loads(table.schema.metadata[b"ctfm"])
    assert about["fingerprint"] == store.fingerprint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_npy_has_packed_arrays_and_where_each_scan_lies(tmp_path: Path, dtype: StoredDtype) -> None:
    store = made(tmp_path / "s", dtype)
    export_store(store, tmp_path / "rows", to="npy")
    arrays = {name: np.load(tmp_path / "rows" / f"{name}.npy") for name in [*TOKENS, "position_mm"]}
    assert arrays["cls"].dtype == (np.float32 if dtype == "bfloat16" else np.dtype(dtype))
    lines = []
    for scan in pq.read_table(tmp_path / "rows" / "scans.parquet").to_pylist():
        start, n_rows = scan.pop("row_start"), scan.pop("n_rows")
        for i in range(n_rows):
            row = {name: array[start + i].tolist() for name, array in arrays.items()}
            lines.append({**scan, "slice": i, **row})
    assert sorted(lines, key=str) == sorted(expected_lines(store), key=str)
    assert len(arrays["cls"]) == len(lines)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_h5_has_the_same_arrays_and_offsets(tmp_path: Path, dtype: StoredDtype) -> None:
    store = made(tmp_path / "s", dtype)
    export_store(store, tmp_path / "rows.h5", to="h5")
    lines = []
    with h5py.File(tmp_path / "rows.h5") as file:
        assert json.loads(file.attrs["ctfm"])["fingerprint"] == store.fingerprint
        offsets = file["offsets"][:]
        for scan in range(len(offsets) - 1):
            ids = {name: file[name].asstr()[scan] for name in ("scan_id", "study_id", "patient_id")}
            for row in range(offsets[scan], offsets[scan + 1]):
                line = {**ids, "view": int(file["view"][scan]), "slice": int(row - offsets[scan])}
                line |= {name: file[name][row].tolist() for name in ["position_mm", *TOKENS]}
                lines.append(line)
        assert offsets[-1] == len(file["cls"])
    assert lines == expected_lines(store)


def test_hf_dataset_opens_with_its_own_library(store: FeatureStore, tmp_path: Path) -> None:
    import datasets

    export_store(store, tmp_path / "rows", to="hf-dataset")
    rows = datasets.load_from_disk(tmp_path / "rows")
    assert rows.to_list() == expected_lines(store)
    assert rows.features["cls"].length == TOKENS["cls"]
    assert not [path for path in (tmp_path / "rows").rglob("*") if path.is_dir()]


def test_a_store_without_any_row_is_refused(tmp_path: Path) -> None:
    store = fill(create(tmp_path / "s", to_store([4])), failed=["scan000"])
    with pytest.raises(StoreError, match="there is nothing to export"):
        export_store(store, tmp_path / "out", to="npy")


@pytest.mark.parametrize("to", FORMATS)
def test_what_stops_it_leaves_nothing_behind(store: FeatureStore, tmp_path: Path, to: str) -> None:
    def killed(n_scans: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_store(store, tmp_path / "out" / "rows", to=to, progress=killed)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_rows_that_are_damaged_are_not_exported(
    store: FeatureStore, tmp_path: Path, to: str
) -> None:
    mean = folder(store) / "embeddings.zarr" / "mean"
    (mean / "c.0.0").write_bytes((mean / "c.1.0").read_bytes())
    with pytest.raises(StoreError, match="are not those that were committed"):
        export_store(store, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    store = create(tmp_path / "s", to_store([4, 7]))
    with pytest.raises(StoreError, match="still pending"):
        export_store(store, tmp_path / "out", to="npy")


def test_what_exists_is_not_overwritten(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(StoreError, match="exists: choose another name"):
        export_store(store, tmp_path / "out", to="parquet")
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_an_unknown_format_names_the_known_ones(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="parquet, npy, h5, hf-dataset, got 'csv'"):
        export_store(store, tmp_path / "out", to="csv")


@pytest.mark.parametrize(("to", "package"), [("h5", "h5py"), ("hf-dataset", "datasets")])
def test_a_missing_package_names_the_extra(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'ctfm\[{to}\]'"):
        export_store(store, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["npy", "h5", "parquet"])
def test_memory_does_not_grow_with_the_store(tmp_path: Path, to: str) -> None:
    peaks = []
    for n_scans in (8, 64):
        scans = to_store([40] * n_scans)
        store = fill(create(tmp_path / f"{n_scans}", scans, shard_scans=4, dtype="float32"))
        export_store(store, tmp_path / f"warm-{n_scans}", to=to)
        tracemalloc.start()
        export_store(store, tmp_path / f"out-{n_scans}", to=to)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    rows_bytes = 56 * 40 * 4 * (sum(TOKENS.values()) + 1)
    assert peaks[1] - peaks[0] < rows_bytes / 2
