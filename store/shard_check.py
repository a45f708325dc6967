"""One shard checked: from its chunks and its commit record, to what is wrong with either.

Its chunks are read whole, with the rows that no scan uses, and fail their CRC-32C or not. The rows
of each scan then have the SHA-256 of the commit record or not; where the record is damaged, that of
`scans.parquet`.

Axes: r rows of the shard.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from jaxtyping import Shaped

from ctfm.store.commits import commit_name, parse_commit
from ctfm.store.embeddings import all_finite, chunk_name
from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.layout import GROUP, POSITION
from ctfm.store.places import Place
from ctfm.store.plan import PENDING, Shard, shard_of_lines
from ctfm.store.tables import SCANS

CHANGED = "its bytes are not those that were published"
MISSING = "is missing"

Results = Mapping[str, Sequence[Any]]
"""Columns of `PENDING` for the lines of a shard, as a commit record has them."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a store."""

    where: str
    """File, relative to the store."""
    what: str
    """One sentence."""
    scan_ids: tuple[str, ...] = ()
    """Scans that it concerns, each once."""
    rows_lost: bool = False
    """Whether their rows have to be extracted again; if not, the rest of the store tells what was
    in the file."""


def scans_of(problems: Iterable[Problem]) -> tuple[str, ...]:
    """Scans that some problems concern, sorted."""
    return tuple(sorted({scan for problem in problems for scan in problem.scan_ids}))


@dataclass(frozen=True, kw_only=True)
class ShardCheck:
    """What reading a shard found."""

    n_rows: int = 0
    """Rows read and compared."""
    bytes_read: int = 0
    statuses: tuple[str, ...]
    """Of its scans and views."""
    problems: tuple[Problem, ...] = ()


def rows_sha256(kept: Mapping[str, Shaped[np.ndarray, "r ..."]]) -> str:
    """Digest of one scan's rows, as they are kept: its tokens by name, then its positions."""
    content = hashlib.sha256()
    for name in [*sorted(name for name in kept if name != POSITION), POSITION]:
        content.update(np.ascontiguousarray(kept[name]).data)
    return content.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreToCheck:
    """What the checks of all shards share."""

    place: Place
    arrays: Mapping[str, zarr.Array]
    """Empty if they cannot be trusted: then no rows are read."""
    done: set[int]
    """Shards that have a commit record."""
    chunk_rows: int


def check_shard(store: StoreToCheck, planned: pa.Table, stored: pa.Table | None) -> ShardCheck:
    """Compare the rows of a shard with what was committed.

    Args:
        store: Where it lies.
        planned: Lines of the shard, from the plan.
        stored: The same lines of `scans.parquet`, if that can be trusted.

    Raises:
        PlaceError: If the place may not be read or does not answer.
    """
    shard = shard_of_lines(planned, chunk_rows=store.chunk_rows)
    ids = tuple(shard.scan_ids())
    table = None if stored is None else _results(stored)
    record, what = _commit(store, shard, expected=table is not None)
    problems = []
    if what:
        lost = record is None and table is None
        problems.append(
            Problem(where=commit_name(shard.index), what=what, scan_ids=ids, rows_lost=lost)
        )
    if record is not None and table is not None:
        problems.extend(_differences(shard, record, table))
    results = record or table
    if results is None:
        return ShardCheck(statuses=("pending",) * len(shard.scans), problems=tuple(problems))
    rows = _Rows(store, shard) if store.arrays else None
    return ShardCheck(
        n_rows=0 if rows is None else sum(results["n_rows"]),
        bytes_read=0 if rows is None else rows.n_bytes,
        statuses=tuple(results["status"]),
        problems=(*problems, *([] if rows is None else rows.problems(results))),
    )


def _results(lines: pa.Table) -> Results | None:
    """What `scans.parquet` says of a shard, if records were merged into it."""
    columns = {name: lines[name].to_pylist() for name in PENDING}
    return None if "pending" in columns["status"] else columns


def _commit(store: StoreToCheck, shard: Shard, *, expected: bool) -> tuple[Results | None, str]:
    """The commit record of a shard, if it can be used, and what is wrong with it."""
    if shard.index not in store.done:
        return None, f"{MISSING}, though {SCANS} has its results" if expected else ""
    try:
        content = store.place.read(commit_name(shard.index))
        record = parse_commit(store.place, shard.index, content)
    except PlaceError:
        raise
    except StoreError:
        return None, CHANGED
    if record["scan_id"] != [scan.scan_id for scan in shard.scans] or record["view"] != [
        scan.view for scan in shard.scans
    ]:
        return None, "lists other scans than the plan"
    return record, ""


def _differences(shard: Shard, record: Results, table: Results) -> Iterator[Problem]:
    differ = [
        scan.scan_id
        for i, scan in enumerate(shard.scans)
        if any(record[name][i] != table[name][i] for name in PENDING)
    ]
    if differ:
        what = f"has other results than {commit_name(shard.index)}"
        yield Problem(where=SCANS, what=what, scan_ids=tuple(dict.fromkeys(differ)))


class _Rows:
    """The rows of one shard in every array, and which of its chunks could not be read."""

    def __init__(self, store: StoreToCheck, shard: Shard) -> None:
        self.store, self.shard = store, shard
        self.bad_chunks: dict[tuple[str, int], str] = {}
        self.kept = {name: self._read(name, array) for name, array in store.arrays.items()}
        self.n_bytes = sum(block.nbytes for block in self.kept.values())

    def _read(self, name: str, array: zarr.Array) -> Shaped[np.ndarray, "r ..."]:
        start, chunk_rows = self.shard.row_start, self.store.chunk_rows
        stop = start + self.shard.n_rows
        files = {
            chunk: f"{name}/{chunk_name(chunk, ndim=array.ndim)}"
            for chunk in range(start // chunk_rows, stop // chunk_rows)
        }
        try:
            return self._chunks(array, start, stop)
        except PlaceError:
            raise
        except Exception:  # whatever a codec raises for bytes that it cannot decode
            return self._chunk_by_chunk(array, files)

    def _chunk_by_chunk(
        self, array: zarr.Array, files: Mapping[int, str]
    ) -> Shaped[np.ndarray, "r ..."]:
        """Zeros where a chunk cannot be read."""
        block = np.zeros((self.shard.n_rows, *array.shape[1:]), dtype=array.dtype)
        chunk_rows = self.store.chunk_rows
        for chunk, file in files.items():
            low = chunk * chunk_rows - self.shard.row_start
            try:
                block[low : low + chunk_rows] = self._chunks(
                    array, chunk * chunk_rows, (chunk + 1) * chunk_rows
                )
            except PlaceError:
                raise
            except FileNotFoundError:
                self.bad_chunks[file, chunk] = f"the chunk file {MISSING}"
            except Exception as error:
                self.bad_chunks[file, chunk] = f"{type(error).__name__}: {error}"
        return block

    def _chunks(self, array: zarr.Array, start: int, stop: int) -> Shaped[np.ndarray, "r ..."]:
        with self.store.place.reading():
            return np.asarray(array[start:stop])

    def problems(self, results: Results) -> Iterator[Problem]:
        """What does not fit the results that were recorded."""
        used = [
            (scan.scan_id, start, start + n_rows)
            for scan, start, n_rows in zip(
                self.shard.scans, self.shard.row_starts(), results["n_rows"], strict=True
            )
        ]
        in_bad_chunk: set[int] = set()
        for (file, chunk), what in sorted(self.bad_chunks.items()):
            touched = self._in_chunk(chunk, used)
            in_bad_chunk.update(start for _, start, _ in touched)
            scan_ids = tuple(dict.fromkeys(scan_id for scan_id, _, _ in touched))
            yield Problem(where=f"{GROUP}/{file}", what=what, scan_ids=scan_ids, rows_lost=True)
        for (scan_id, start, stop), sha256 in zip(used, results["sha256"], strict=True):
            if start not in in_bad_chunk and stop > start:
                yield from self._scan_problems(scan_id, slice(start, stop), sha256=sha256)

    def _in_chunk(
        self, chunk: int, used: Sequence[tuple[str, int, int]]
    ) -> list[tuple[str, int, int]]:
        """Scans with rows in a chunk; if none has, the one for which it is reserved."""
        low, high = chunk * self.store.chunk_rows, (chunk + 1) * self.store.chunk_rows
        touched = [scan for scan in used if max(scan[1], low) < min(scan[2], high)]
        if touched:
            return touched
        before = [scan for scan in used if scan[1] < high]
        return before[-1:]

    def _scan_problems(self, scan_id: str, rows: slice, *, sha256: str) -> Iterator[Problem]:
        first = self.shard.row_start
        kept = {
            name: block[rows.start - first : rows.stop - first] for name, block in self.kept.items()
        }
        where = f"{GROUP}, rows {rows.start} to {rows.stop - 1}"
        if rows_sha256(kept) != sha256:
            what = "not the bytes that were committed"
        elif not all(all_finite(block) for block in kept.values()):
            what = "holds NaN or infinity"
        else:
            return
        yield Problem(where=where, what=what, scan_ids=(scan_id,), rows_lost=True)
