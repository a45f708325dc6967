"""The scan catalogue: both tables come back as written, and only one holds secrets."""

import itertools
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.store import files
from ctfm.store.catalogue import (
    PRIVATE_SCHEMA,
    SCANS_SCHEMA,
    Catalogue,
    check_key,
    key_for,
    private_path,
    read_catalogue,
    read_former,
)
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
    with pytest.raises(StoreError, match="are not of one `ctfm index`"):
        read_catalogue(path)


def of_scans(*scan_ids: str) -> Catalogue:
    """A catalogue whose scans lie under a folder of their names."""
    scans = pa.Table.from_pylist([line(scan) for scan in scan_ids], SCANS_SCHEMA)
    return Catalogue(scans=scans, files={scan: [f"/{scan}.nii"] for scan in scan_ids}, key=KEY)


def scans_at(path: Path) -> tuple[str, ...]:
    """The scans of a catalogue, each of which has the files that belong to it."""
    read = read_catalogue(path)
    assert read.files == {scan: [f"/{scan}.nii"] for scan in read.files}
    assert set(read.scans["scan_id"].to_pylist()) == set(read.files)
    return tuple(read.scans["scan_id"].to_pylist())


def around_publications(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[], None], after: Callable[[], None]
) -> None:
    """Do something before and after every publication of a table."""

    def publish_table(path: Path, table: pa.Table, *, mode: int | None = None) -> None:
        before()
        files.publish_table(path, table, mode=mode)
        after()

    monkeypatch.setattr("ctfm.store.catalogue.publish_table", publish_table)


@pytest.mark.parametrize("before", [("old",), ("old", "new1"), ("new1", "new2")])
@pytest.mark.parametrize("died_at", [0, 1, 2, 3])
def test_a_writer_that_dies_leaves_the_old_catalogue_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[str, ...], died_at: int
) -> None:
    path, new = tmp_path / "scans.parquet", ("new1", "new2")
    of_scans(*before).write(path)
    moments = itertools.count()

    def die() -> None:
        if next(moments) == died_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        around_publications(patch, die, die)
        with pytest.raises(KeyboardInterrupt):
            of_scans(*new).write(path)
    assert scans_at(path) == (before if died_at == 0 else new)
    former = read_former(path)
    assert former is not None
    assert former.scans.equals(read_catalogue(path).scans)
    of_scans("later").write(path)
    assert scans_at(path) == ("later",)


def test_whoever_reads_between_the_two_publications_gets_one_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "scans.parquet", []
    of_scans("a", "b").write(path)
    around_publications(
        monkeypatch, lambda: seen.append(scans_at(path)), lambda: seen.append(scans_at(path))
    )
    of_scans("b", "c", "d").write(path)
    assert seen == [("a", "b"), *[("b", "c", "d")] * 3]


@pytest.mark.parametrize("turns", sorted(set(itertools.permutations("AABB"))))
def test_two_writers_at_once_leave_the_catalogue_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: tuple[str, ...]
) -> None:
    path, left, turn = tmp_path / "scans.parquet", list(turns), threading.Condition()
    of_scans("a", "b", "old").write(path)

    def wait_for_turn() -> None:
        with turn:
            turn.wait_for(lambda: not left or left[0] == threading.current_thread().name)

    def next_turn() -> None:
        with turn:
            del left[:1]
            turn.notify_all()

    around_publications(monkeypatch, wait_for_turn, next_turn)
    written = {"A": of_scans("a", "old"), "B": of_scans("b", "old")}
    writers = [
        threading.Thread(target=one.write, args=[path], name=n) for n, one in written.items()
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    last = max("AB", key=lambda name: turns.index(name))  # whose private table came last
    assert scans_at(path) == (last.lower(), "old")


def test_a_reader_takes_no_pair_of_which_one_was_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "scans.parquet", pq.read_table
    of_scans("a").write(path)
    others = iter([of_scans("a", "b"), of_scans("a", "b", "c")])

    def replaced_after_the_first(file: Path) -> pa.Table:
        table = read(file)
        if file == path:
            for other in others:
                other.write(path)
        return table

    monkeypatch.setattr(pq, "read_table", replaced_after_the_first)
    assert scans_at(path) == ("a", "b", "c")


def test_a_shared_table_of_fewer_scans_is_taken_as_its_user_left_it(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    of_scans("a", "b", "c").write(path)
    pq.write_table(pq.read_table(path).slice(1), path)
    assert read_catalogue(path).scans["scan_id"].to_pylist() == ["b", "c"]


def test_a_catalogue_of_before_opens_and_is_replaced(tmp_path: Path) -> None:
    path, new = tmp_path / "scans.parquet", tmp_path / "new.parquet"
    of_scans("a", "b").write(new)
    for table, place in ((new, path), (private_path(new), private_path(path))):
        content = pq.read_table(table)
        names = [name for name in PRIVATE_SCHEMA.names if name in content.column_names]
        content = content if table == new else content.select(names)
        said = content.schema.metadata
        kept = {key: said[key] for key in (b"ctfm", b"ctfm_pseudonym_key") if key in said}
        pq.write_table(content.replace_schema_metadata(kept), place)
    assert scans_at(path) == ("a", "b")
    of_scans("a", "c").write(path)
    assert scans_at(path) == ("a", "c")


def test_a_key_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "scans.parquet"
    check_key(path, KEY)
    of_scans("a").write(path)
    check_key(path, KEY)
    check_key(path, None)
    with pytest.raises(StoreError, match=r"another `ctfm index` wrote .* meanwhile"):
        check_key(path, bytes(32))
