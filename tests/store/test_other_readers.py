"""A store is read by libraries that have never heard of ctfm."""

import json
from pathlib import Path

import duckdb
import numpy as np
import polars
import pytest
import xarray
from toy_store import TOKENS, create, fill, to_store

from ctfm.store import layout
from ctfm.store.features import FeatureStore


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return fill(create(tmp_path / "store", to_store([4, 6, 5, 7, 4])), failed=["scan003"])


def opened(store: FeatureStore) -> xarray.Dataset:
    group = f"{store.path}/{layout.GROUP}"
    dataset: xarray.Dataset = xarray.open_zarr(group, consolidated=False, chunks=None)
    return dataset


def test_xarray_opens_the_embeddings(store: FeatureStore) -> None:
    dataset = opened(store)
    assert dataset["position_mm"].dims == ("row",)
    assert {name: dataset[name].dims for name in TOKENS} == {
        name: ("row", f"{name}_width") for name in TOKENS
    }
    line = store.finished_scans().to_pylist()[0]
    mine = dataset["cls"][line["row_start"] : line["row_start"] + line["n_rows"]]
    np.testing.assert_array_equal(mine, store.load([line["scan_id"]], "cls")[0])


def test_xarray_opens_a_store_of_before_once_it_is_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layout.metadata_files

    def without_names(*args: object, **options: object) -> dict[str, bytes]:
        old = {}
        for name, content in made(*args, **options).items():  # type: ignore[arg-type]
            metadata = json.loads(content)
            metadata.pop("dimension_names", None)
            old[name] = layout._sealed(metadata)
        return old

    with monkeypatch.context() as patch:
        patch.setattr("ctfm.store.growth.metadata_files", without_names)
        store = fill(create(tmp_path / "store", to_store([40] * 4)))
    with pytest.raises((KeyError, ValueError)):
        opened(store)
    assert store.verify().ok
    store = fill(create(tmp_path / "store", to_store([40] * 9)))
    assert set(opened(store).sizes) == {"row", *(f"{name}_width" for name in TOKENS)}
    assert store.verify().ok


def test_duckdb_and_polars_read_the_table(store: FeatureStore) -> None:
    table = f"{store.path}/scans.parquet"
    counted = duckdb.sql(f"select status, count(*) from '{table}' group by status")
    assert dict(counted.fetchall()) == {"ok": 4, "failed": 1}
    assert polars.read_parquet(table)["status"].value_counts(sort=True)["count"].to_list() == [4, 1]
