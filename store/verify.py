"""Verification: from a feature store, to every scan whose bytes are not those that were committed.

Everything is read again: `scans.parquet` against its recorded digest, each commit record against
its seal, the plan and `scans.parquet`, each chunk against its CRC-32C, the rows of each scan
against the SHA-256 in the commit record. The last also finds a chunk file that is gone, which Zarr
reads as zeros.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from jaxtyping import Shaped

from ctfm.store.commits import (
    COMMITS,
    RESULT_COLUMNS,
    SCANS,
    commit_path,
    committed,
    read_commit,
    read_scans,
    scans_are_intact,
)
from ctfm.store.embeddings import (
    GROUP,
    POSITION,
    StoreHeader,
    all_finite,
    chunk_name,
    open_array,
)
from ctfm.store.errors import StoreError
from ctfm.store.plan import Shard, planned_rows, shard_of_lines, shard_slices


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a store."""

    where: str
    """File, relative to the store."""
    what: str
    """One sentence."""
    scan_ids: tuple[str, ...] = ()
    """Scans that it touches, where that can be told."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a whole reading of a store found."""

    scans: int
    """Lines of `scans.parquet`: scans and their views."""
    pending: int
    """Of these, not extracted yet; that is no problem."""
    rows: int
    """Rows read and compared."""
    bytes_read: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was committed."""
        return not self.problems

    @property
    def damaged_scans(self) -> tuple[str, ...]:
        """Scans that a problem touches, sorted."""
        return tuple(sorted({scan for problem in self.problems for scan in problem.scan_ids}))


def rows_sha256(kept: Mapping[str, Shaped[np.ndarray, "r ..."]]) -> str:
    """Digest of one scan's rows, as they are kept: its tokens by name, then its positions."""
    content = hashlib.sha256()
    for name in [*sorted(name for name in kept if name != POSITION), POSITION]:
        content.update(np.ascontiguousarray(kept[name]).data)
    return content.hexdigest()


def verify_store(store: Path, header: StoreHeader) -> VerifyReport:
    """Read a whole store again and compare it with what was committed.

    Args:
        store: Its folder.
        header: As read from its group, where it was checked against the fingerprint.
    """
    problems = list(_check_scans_file(store))
    try:
        table = read_scans(store)
        slices = shard_slices(table)
        done = committed(store)
        arrays = _open_arrays(store, header, table=table)
    except StoreError as error:
        problems.append(Problem(where=".", what=str(error)))
        return VerifyReport(scans=0, pending=0, rows=0, bytes_read=0, problems=tuple(problems))
    for shard in sorted(done - set(slices)):
        path = commit_path(store, shard)
        problems.append(Problem(where=_relative(store, path), what="belongs to no planned shard"))
    pending = rows = bytes_read = 0
    for shard, lines in slices.items():
        part = table.slice(lines.start, lines.stop - lines.start)
        record, found = _check_commit(store, part, is_done=shard in done)
        problems.extend(found)
        if record is None:
            pending += 0 if shard in done else part.num_rows
            continue
        check = _ShardCheck(arrays, shard_of_lines(part, chunk_rows=_chunk_rows(arrays)))
        problems.extend(check.problems(record))
        rows += sum(record["n_rows"])
        bytes_read += check.bytes_read
    return VerifyReport(
        scans=table.num_rows,
        pending=pending,
        rows=rows,
        bytes_read=bytes_read,
        problems=tuple(problems),
    )


class _ShardCheck:
    """The arrays' rows of one shard, read chunk by chunk so that a bad one can be named."""

    def __init__(self, arrays: Mapping[str, zarr.Array], shard: Shard) -> None:
        self.shard = shard
        self.chunk_rows = _chunk_rows(arrays)
        self.bad_chunks: dict[tuple[str, int], str] = {}
        self.kept = {name: self._read(name, array) for name, array in arrays.items()}
        self.bytes_read = sum(block.nbytes for block in self.kept.values())

    def _read(self, name: str, array: zarr.Array) -> Shaped[np.ndarray, "r ..."]:
        start, stop = self.shard.row_start, self.shard.row_start + self.shard.n_rows
        block = np.zeros((self.shard.n_rows, *array.shape[1:]), dtype=array.dtype)
        for low in range(start, stop, self.chunk_rows):
            try:
                block[low - start : low - start + self.chunk_rows] = array[
                    low : low + self.chunk_rows
                ]
            except Exception as error:  # whatever a codec raises for bytes that it cannot decode
                chunk = low // self.chunk_rows
                file = f"{GROUP}/{name}/{chunk_name(chunk, ndim=array.ndim)}"
                self.bad_chunks[file, chunk] = f"{type(error).__name__}: {error}"
        return block

    def problems(self, record: Mapping[str, Sequence[Any]]) -> Iterator[Problem]:
        """What does not fit the commit record."""
        scans = [
            (scan.scan_id, start, start + n_rows, sha256)
            for scan, start, n_rows, sha256, status in zip(
                self.shard.scans,
                self.shard.row_starts(),
                record["n_rows"],
                record["sha256"],
                record["status"],
                strict=True,
            )
            if status == "ok"
        ]
        in_bad_chunk: set[int] = set()
        for (file, chunk), what in self.bad_chunks.items():
            low, high = chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows
            touched = {start: scan for scan, start, stop, _ in scans if start < high and stop > low}
            in_bad_chunk.update(touched)
            yield Problem(where=file, what=what, scan_ids=tuple(dict.fromkeys(touched.values())))
        for scan_id, start, stop, sha256 in scans:
            if start not in in_bad_chunk:
                yield from self._scan_problems(scan_id, slice(start, stop), sha256=sha256)

    def _scan_problems(self, scan_id: str, rows: slice, *, sha256: str) -> Iterator[Problem]:
        first = self.shard.row_start
        kept = {
            name: block[rows.start - first : rows.stop - first] for name, block in self.kept.items()
        }
        where = f"{GROUP}, rows {rows.start} to {rows.stop - 1}"
        if rows_sha256(kept) != sha256:
            yield Problem(
                where=where,
                what="not the bytes that were committed: changed, or a chunk file is missing",
                scan_ids=(scan_id,),
            )
        elif not all(all_finite(block) for block in kept.values()):
            yield Problem(where=where, what="holds NaN or infinity", scan_ids=(scan_id,))


def _check_scans_file(store: Path) -> Iterator[Problem]:
    try:
        if not scans_are_intact(store):
            yield Problem(where=SCANS, what="its bytes are not those that were published")
    except StoreError as error:
        yield Problem(where=COMMITS, what=str(error))


def _open_arrays(store: Path, header: StoreHeader, *, table: pa.Table) -> dict[str, zarr.Array]:
    arrays = {name: open_array(store / GROUP, name) for name in [*header.tokens, POSITION]}
    chunk_rows = _chunk_rows(arrays)
    for name, array in arrays.items():
        width = (header.tokens[name],) if name != POSITION else ()
        n_rows = planned_rows(table, chunk_rows=chunk_rows)
        if array.chunks != (chunk_rows, *width) or array.shape[0] < n_rows:
            raise StoreError(
                f"{GROUP}/{name} has shape {array.shape} and chunks {array.chunks}, planned are "
                f"{(n_rows, *width)} and {(chunk_rows, *width)}: its zarr.json was changed"
            )
    return arrays


def _check_commit(
    store: Path, part: pa.Table, *, is_done: bool
) -> tuple[dict[str, list[Any]] | None, list[Problem]]:
    """The commit record of a shard if it can be used, and what is wrong with it."""
    shard, ids = part["shard"][0].as_py(), part["scan_id"].to_pylist()
    where = _relative(store, commit_path(store, shard))
    merged = "pending" not in part["status"].to_pylist()
    if not is_done:
        gone = "is missing, though scans.parquet has its results: run `ctfm extract` again"
        return None, [Problem(where=where, what=gone, scan_ids=_unique(ids))] if merged else []
    try:
        record = read_commit(store, shard)
    except StoreError as error:
        return None, [Problem(where=where, what=str(error), scan_ids=_unique(ids))]
    if record["scan_id"] != ids or record["view"] != part["view"].to_pylist():
        what = "lists other scans than scans.parquet"
        return None, [Problem(where=where, what=what, scan_ids=_unique(ids))]
    if not merged:
        return record, []
    columns = {name: part[name].to_pylist() for name in RESULT_COLUMNS}
    differ = [
        scan_id
        for i, scan_id in enumerate(ids)
        if any(record[name][i] != columns[name][i] for name in RESULT_COLUMNS)
    ]
    what = f"has other results than {where}"
    return record, [Problem(where=SCANS, what=what, scan_ids=_unique(differ))] if differ else []


def _chunk_rows(arrays: Mapping[str, zarr.Array]) -> int:
    return int(arrays[POSITION].chunks[0])


def _relative(store: Path, path: Path) -> str:
    return path.relative_to(store).as_posix()


def _unique(ids: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ids))
