"""Publication: whole files or none, whatever kills the writer."""

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctfm.store import files
from ctfm.store.errors import StoreError
from ctfm.store.files import LEFTOVER_AGE_S, add_bytes, publish_bytes, publish_table, writing


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_publishes_exactly_the_bytes_and_nothing_else(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "a.json", b"old")
    publish_bytes(tmp_path / "a.json", memoryview(b"new"))
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert names(tmp_path) == ["a.json"]


def test_publishes_a_table_that_any_parquet_reader_opens(tmp_path: Path) -> None:
    table = pa.table({"scan_id": ["a", "b", "c"], "n_rows": [3, 1, 2]})
    publish_table(tmp_path / "scans.parquet", table)
    assert pq.read_table(tmp_path / "scans.parquet").equals(table)


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        publish_table(tmp_path / name, pa.table({"x": [1.5, None]}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_private_file_is_never_readable_by_others_even_before_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(stat.S_IMODE(os.fstat(fd).st_mode)))
    publish_bytes(tmp_path / "key", b"secret", mode=0o600)
    assert modes[0] == 0o600
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_the_umask_does_not_take_bits_off_an_explicit_mode(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        publish_bytes(tmp_path / "shared", b"x", mode=0o664)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o664


def test_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"),
    )

    def recorded(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recorded)
    publish_bytes(tmp_path / "a", b"x")
    assert events == ["file", "rename", "folder"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_bytes(tmp_path / "a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*a: the disk is full: free some space"):
        publish_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
        (errno.EEXIST, "a file has that name"),
        (errno.EIO, "check the disk"),
    ],
)
def test_says_what_the_operating_system_said_in_plain_words(code: int, sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence), writing(Path("a")):
        raise OSError(code, os.strerror(code))


def test_a_missing_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="folder does not exist"):
        publish_bytes(tmp_path / "nowhere" / "a", b"x")


def test_a_writer_that_is_killed_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from ctfm.store.files import publish_bytes\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        "publish_bytes(sys.argv[1], b'half')\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.json")], check=False)
    assert killed.returncode == -9
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".a.json.")
    assert leftover.endswith(files.PARTIAL_SUFFIX)


def test_the_next_publication_removes_old_leftovers_of_its_own_name_only(tmp_path: Path) -> None:
    old_s = time.time() - 2 * LEFTOVER_AGE_S
    for name in (".a.json.00ff.partial", ".b.json.00ff.partial"):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (old_s, old_s))
    (tmp_path / ".a.json.11ff.partial").write_bytes(b"another process writes this one now")
    publish_bytes(tmp_path / "a.json", b"x")
    assert names(tmp_path) == [".a.json.11ff.partial", ".b.json.00ff.partial", "a.json"]


def test_a_leftover_from_the_future_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".a.json.00ff.partial"
    leftover.write_bytes(b"half")
    future_s = time.time() + 2 * LEFTOVER_AGE_S
    os.utime(leftover, (future_s, future_s))
    publish_bytes(tmp_path / "a.json", b"x")
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("ahead_s", [2 * LEFTOVER_AGE_S, -2 * LEFTOVER_AGE_S])
def test_a_writer_with_a_wrong_clock_leaves_live_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    live = tmp_path / ".a.json.11ff.partial"
    live.write_bytes(b"another process writes this one now")
    right_s = time.time
    monkeypatch.setattr(time, "time", lambda: right_s() + ahead_s)
    publish_bytes(tmp_path / "a.json", b"x")
    assert live.exists()


@pytest.mark.parametrize("publish", [publish_bytes, add_bytes])
def test_a_file_that_is_taken_for_a_leftover_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: Callable[[Path, bytes], object]
) -> None:
    write = files._write_synced
    taken: list[Path] = []

    def written_then_taken(path: Path, data: bytes, *, mode: int | None) -> None:
        write(path, data, mode=mode)
        if len(taken) < 2:
            path.unlink()
            taken.append(path)

    monkeypatch.setattr(files, "_write_synced", written_then_taken)
    publish(tmp_path / "a.json", b"x")
    assert names(tmp_path) == ["a.json"]
    assert len(taken) == 2


def test_a_file_that_vanishes_again_and_again_is_not_a_missing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files._write_synced

    def written_then_taken(path: Path, data: bytes, *, mode: int | None) -> None:
        write(path, data, mode=mode)
        path.unlink()

    monkeypatch.setattr(files, "_write_synced", written_then_taken)
    with pytest.raises(StoreError, match="vanished while it was written"):
        publish_bytes(tmp_path / "a.json", b"x")
