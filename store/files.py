"""Files: from bytes in memory, to a file that is there as a whole or not at all.

Publication is write to a temporary name in the same folder, fsync, rename, fsync of the folder
(POSIX: `rename` replaces a name atomically; only the fsync of the folder makes the new name
survive a power cut). What a kill leaves behind is called `.<name>.<random>.partial`; nothing
takes it for the file, and a later publication of the same file removes it.

An `OSError` (full disk, read-only folder, missing rights) leaves here as a `StoreError`.
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctfm.store.errors import StoreError

PARTIAL_SUFFIX = ".partial"
"""Ends the name of everything that is not published yet (Zarr's own local store uses it too)."""

LEFTOVER_AGE_S = 3600.0
"""A partial file untouched for longer belongs to a writer that is dead."""

ATTEMPTS = 3
"""To publish a file whose partial one is removed by somebody else meanwhile."""

_CAUSES = {
    errno.ENOSPC: "the disk is full: free some space, then run the same command again",
    errno.EDQUOT: "your disk quota is used up: free some space, then run the same command again",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "permission denied: choose a folder that you may write, or ask for the rights",
    errno.EPERM: "permission denied: choose a folder that you may write, or ask for the rights",
    errno.ENOENT: "its folder does not exist: check the path",
    errno.ENOTDIR: "a part of its path is a file, not a folder: check the path",
    errno.EISDIR: "a folder has that name: choose another path",
    errno.EEXIST: "a file has that name: choose another path",
}

# A file system without hard links (exFAT, some network mounts): what is left is look, then rename.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}


def publish_bytes(path: Path | str, data: bytes | memoryview, *, mode: int | None = None) -> None:
    """Write a file so that every reader sees the old content or the new one, never a part.

    Args:
        path: The file; its folder exists. An existing file is replaced.
        data: The whole content.
        mode: Permission bits, set before the first byte is written (0o600 for what must stay
            private). None gives what the umask allows.

    Raises:
        StoreError: If the file cannot be written; the old one, if any, is untouched.
    """
    _publish(Path(path), data, mode=mode, give_name=_replacing)


def add_bytes(path: Path | str, data: bytes | memoryview) -> bool:
    """Publish a file unless one of that name is there; of several writers one succeeds.

    Args:
        path: The file; its folder exists.
        data: The whole content.

    Returns:
        Whether the file is new; otherwise the one that is there is untouched.

    Raises:
        StoreError: If the file cannot be written.
    """
    return _publish(Path(path), data, mode=None, give_name=_named_if_free)


def table_of(content: bytes) -> pa.Table:
    """The table that a Parquet file in memory holds, read in the calling thread.

    The bytes are Python's. A thread of Arrow's that lets go of them while the interpreter ends
    would abort the process, after all its work was done (as `pyarrow.parquet.read_table` did in one
    of ten short processes).
    """
    return pq.ParquetFile(pa.BufferReader(content), pre_buffer=False).read(use_threads=False)


def publish_table(path: Path | str, table: pa.Table, *, mode: int | None = None) -> None:
    """Write a table as a Parquet file, published like `publish_bytes`.

    The same table gives the same bytes with the same pyarrow. Pages carry checksums.

    Raises:
        StoreError: If the file cannot be written; the old one, if any, is untouched.
    """
    publish_bytes(path, memoryview(parquet_bytes(table)), mode=mode)


def parquet_bytes(table: pa.Table) -> bytes:
    """The Parquet file of a table, in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def partial_path(path: Path) -> Path:
    """A new name beside `path` for what will be renamed to it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}")


def remove_leftovers(folder: Path, *, name: str | None = None) -> None:
    """Remove what killed writers left in a folder.

    Args:
        folder: Where to look; nothing below it is touched.
        name: Of the file or folder that they were writing; None is any, Zarr's chunks included.
            What was touched within `LEFTOVER_AGE_S` stays: another process may be writing it.

    Ages are those of the file system, which may lie on another machine than this one: its clock
    tells live files from dead ones even where ours is wrong. What is dated further in the future
    than a live file can be was written under a wrong clock, and is removed, too.
    """
    pattern = "*" if name is None else f".{glob.escape(name)}.*"
    leftovers = list(folder.glob(pattern + PARTIAL_SUFFIX))
    if not leftovers:
        return
    now_s = _clock_s(folder)
    for leftover in leftovers:
        with contextlib.suppress(FileNotFoundError):
            if abs(now_s - leftover.stat().st_mtime) <= LEFTOVER_AGE_S:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder, and journals its names itself.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into a `StoreError` that says what to do.

    Args:
        path: What the body writes, as the user knows it.
    """
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, f"{error.strerror or error}: check the disk")
        if error.errno == errno.ENOENT and path.parent.is_dir():
            cause = "a file vanished while it was written: run the same command again"
        raise StoreError(f"cannot write {path}: {cause}") from error


def _publish(
    path: Path,
    data: bytes | memoryview,
    *,
    mode: int | None,
    give_name: Callable[[Path, Path], bool],
) -> bool:
    """Write a partial file and give it its name; what `give_name` returns."""
    with writing(path):
        remove_leftovers(path.parent, name=path.name)
        for attempts_left in reversed(range(ATTEMPTS)):
            partial = partial_path(path)
            try:
                _write_synced(partial, data, mode=mode)
                named = give_name(partial, path)
                break
            except FileNotFoundError:
                # A writer with a wrong clock took the live file for a leftover.
                if not attempts_left or not path.parent.is_dir():
                    raise
            finally:
                partial.unlink(missing_ok=True)
        sync(path.parent)
    return named


def _clock_s(folder: Path) -> float:
    """What time it is where a folder lies."""
    probe = partial_path(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _replacing(partial: Path, path: Path) -> bool:
    partial.replace(path)
    return True


def _named_if_free(partial: Path, path: Path) -> bool:
    """Give a file its name unless that is taken."""
    try:
        os.link(partial, path)  # unlike rename, it refuses a name that is taken
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        partial.replace(path)
    return True


def _write_synced(path: Path, data: bytes | memoryview, *, mode: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(path, flags, 0o666 if mode is None else mode)
    with open(descriptor, "wb") as file:
        if mode is not None:
            os.fchmod(descriptor, mode)  # the umask may have taken bits away
        file.write(data)
        file.flush()
        os.fsync(descriptor)
