"""The scan catalogue: both tables come back as written, and only one holds secrets."""

import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.store.catalogue import SCANS_SCHEMA, Catalogue, key_for, private_path, read_catalogue
from ctfm.store.errors import StoreError

KEY = bytes(range(7, 39))
DIGESTS = {"c1": "5eed"}
FILES = {"c1": ["/archive/ward.zip::a/1.dcm", "/archive/ward.zip::a/2.dcm"], "c2": ["/x/y.nii"]}


def line(scan_id: str, **columns: Any) -> dict[str, Any]:
    required = {"study_id": "s1", "patient_id": "p1", "usable": True, "reason": "ok", "detail": ""}
    return {"scan_id": scan_id, "format": "dicom", **required, **columns}


def catalogue(key: bytes | None = KEY) -> Catalogue:
    lines = [line("c1", n_slices=28, tilt_deg=18.5), line("c2", usable=False, reason="localizer")]
    scans = pa.Table.from_pylist(lines, SCANS_SCHEMA)
    return Catalogue(scans=scans, files=FILES, key=key, digests=DIGESTS)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    catalogue().write(path)
    read = read_catalogue(path)
    assert read.scans.equals(catalogue().scans)
    assert read.scans.schema.equals(SCANS_SCHEMA)
    assert read.files == FILES
    assert read.digests == DIGESTS
    assert read.key == KEY


def test_the_private_table_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    catalogue().write(path)
    assert private_path(path).name == "scans.private.parquet"
    assert stat.S_IMODE(private_path(path).stat().st_mode) == 0o600


def test_the_shared_table_holds_neither_key_nor_path(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    catalogue().write(path)
    content = path.read_bytes()
    secrets = (KEY, KEY.hex().encode(), b"archive", b"/x/y", b"5eed")
    assert not any(secret in content for secret in secrets)


def test_the_shared_table_can_be_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    catalogue().write(path)
    private_path(path).unlink()
    read = read_catalogue(path, private=False)
    assert (len(read.scans), read.files, read.key) == (2, {}, None)
    with pytest.raises(StoreError, match=r"scans\.private\.parquet is missing beside"):
        read_catalogue(path)


def test_a_new_index_keeps_the_key_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    assert key_for(path) != key_for(path)
    catalogue().write(path)
    assert key_for(path) == KEY


def test_a_catalogue_with_original_ids_has_no_key(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    catalogue(key=None).write(path)
    assert read_catalogue(path).key is None
    assert len(key_for(path)) == 32


def test_a_table_that_is_none_of_ours_is_refused_by_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    pq.write_table(catalogue().scans.drop(["reason"]).append_column("age", [[61, 62]]), path)
    with pytest.raises(StoreError, match="columns reason, age are missing"):
        read_catalogue(path, private=False)


def test_a_table_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    scans = catalogue().scans.replace_schema_metadata({"ctfm": '{"kind": "catalogue"}'})
    pq.write_table(scans, path)
    with pytest.raises(StoreError, match="not written by this version"):
        read_catalogue(path, private=False)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    catalogue().write(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError, match="cannot be read as a Parquet table"):
        read_catalogue(path)


def test_a_table_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pq, "read_table", refuse)
    with pytest.raises(StoreError, match="may not be read by this user"):
        read_catalogue(tmp_path / "scans.parquet")


def test_tables_of_two_indexes_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "scans.parquet", tmp_path / "other.parquet"
    catalogue().write(path)
    lone = catalogue().scans.slice(0, 1)
    Catalogue(scans=lone, files={"c1": FILES["c1"]}, key=KEY).write(other)
    private_path(other).rename(private_path(path))
    with pytest.raises(StoreError, match="lists no files for 1 of the 2 scans"):
        read_catalogue(path)
