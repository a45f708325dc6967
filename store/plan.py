"""The plan: from scans and the most rows each can have, to the rows and the shard of each.

It is made before the first forward pass and kept in `scans.parquet`: a scan's rows are
`row_start : row_start + max_rows` of every array, whoever writes them and whenever. A shard starts
and ends on a chunk boundary, so no two writers ever touch the same chunk. A plan only grows:
what it says about a scan never changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctfm.store.errors import StoreError

CHUNK_BYTES = 2 * 1024 * 1024
"""A chunk is about this large: fast to read, cheap to list."""

SHARD_SCANS = 64
"""Most scans of a shard, unless told otherwise: 1,200 files a large cohort."""

FEWEST_SHARD_SCANS = 4
SHARDS_A_PLAN = 16
"""A small cohort has about so many shards: a kill costs a sixteenth of it."""

STORE_SCHEMA = pa.schema(
    [
        pa.field("scan_id", pa.string(), nullable=False),
        pa.field("study_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("view", pa.int32(), nullable=False),  # 0 is the clean one
        pa.field("row_start", pa.int64(), nullable=False),  # first row in every array
        pa.field("n_rows", pa.int32(), nullable=False),  # rows in use, 0 unless ok
        pa.field("status", pa.string(), nullable=False),  # ok | failed | pending
        pa.field("reason", pa.string(), nullable=False),  # a `Reason` value, "" while pending
        pa.field("detail", pa.string(), nullable=False),  # one sentence, or ""
        pa.field("sha256", pa.string(), nullable=False),  # of the scan's rows, "" unless ok
        pa.field("source", pa.string(), nullable=False),  # keyed digest of its files, "" if unknown
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("max_rows", pa.int32(), nullable=False),  # rows reserved
    ]
)
"""Columns of `scans.parquet` in a feature store; one line a scan and view, in order of rows."""

PLAN_COLUMNS = ("scan_id", "study_id", "patient_id", "view", "row_start", "shard", "max_rows")
"""What is known before the first forward pass."""

PENDING = {
    "n_rows": 0,
    "status": "pending",
    "reason": "",
    "detail": "",
    "sha256": "",
    "source": "",
}
"""What extraction adds, as long as it has not."""


@dataclass(frozen=True, kw_only=True)
class ScanToStore:
    """One view of a scan that is to get rows."""

    scan_id: str
    study_id: str
    patient_id: str
    view: int = 0
    """0 is the clean one, the others are augmented."""
    max_rows: int
    """Most rows it can have, from its header and the grid; at least 1."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The unit of extraction work: scans that one worker writes and commits at once."""

    index: int
    row_start: int
    """First row, a multiple of the rows of a chunk."""
    n_rows: int
    """Rows reserved, whole chunks."""
    scans: tuple[ScanToStore, ...]

    @property
    def name(self) -> str:
        """Stem of its commit record."""
        return f"{self.index:06d}"

    def scan_ids(self) -> list[str]:
        """Its scans, each once whatever its views."""
        return list(dict.fromkeys(scan.scan_id for scan in self.scans))

    def row_starts(self) -> list[int]:
        """First row of each scan: they lie one after another, each with its most rows."""
        starts = [self.row_start]
        for scan in self.scans:
            starts.append(starts[-1] + scan.max_rows)
        return starts[:-1]


def rows_per_chunk(row_bytes: int, *, shard_rows: int) -> int:
    """How many rows make a chunk of about `CHUNK_BYTES`, the same for all arrays of a store.

    A shard is a whole number of chunks, whatever the width of a row: stores of several backbones
    over the same scans so have the same shards, and one pass over the scans fills them all.

    Args:
        row_bytes: Of one row of the widest array.
        shard_rows: Rows that one shard needs.
    """
    chunks = max(1, round(shard_rows * row_bytes / CHUNK_BYTES))
    return -(-shard_rows // chunks)


def shard_scans_for(n_scans: int) -> int:
    """Scans of a shard in a plan of that many: what a kill can cost."""
    return max(FEWEST_SHARD_SCANS, min(n_scans // SHARDS_A_PLAN, SHARD_SCANS))


def plan_shards(
    scans: Sequence[ScanToStore],
    *,
    chunk_rows: int,
    shard_scans: int = SHARD_SCANS,
    first_index: int = 0,
    first_row: int = 0,
) -> tuple[Shard, ...]:
    """Pack scans into shards, in their order; all views of a scan go to the same shard.

    Which scans share a shard depends on `shard_scans` alone, never on the width of a row.

    Args:
        scans: Each scan and view once.
        chunk_rows: Rows of a chunk.
        shard_scans: Scans of a shard (each view counts), but for the last; 1 or more. Views that
            do not divide it evenly make a shard a little larger.
        first_index: Of the first new shard; the shards before it stay as they are.
        first_row: Where the shards before it end, a multiple of `chunk_rows`.

    Raises:
        StoreError: If a scan occurs twice or has no rows, or `shard_scans` is not positive.
    """
    _check(scans, shard_scans=shard_scans)
    shards = []
    for index, members in enumerate(_packed(_grouped(scans), shard_scans=shard_scans), first_index):
        n_rows = _whole_chunks(sum(scan.max_rows for scan in members), chunk_rows)
        shards.append(Shard(index=index, row_start=first_row, n_rows=n_rows, scans=tuple(members)))
        first_row += n_rows
    return tuple(shards)


def plan_table(shards: Sequence[Shard]) -> pa.Table:
    """The lines of `scans.parquet` for shards that nobody has worked on yet."""
    scans = [scan for shard in shards for scan in shard.scans]
    columns = {
        "scan_id": [scan.scan_id for scan in scans],
        "study_id": [scan.study_id for scan in scans],
        "patient_id": [scan.patient_id for scan in scans],
        "view": [scan.view for scan in scans],
        "row_start": [start for shard in shards for start in shard.row_starts()],
        "shard": [shard.index for shard in shards for _ in shard.scans],
        "max_rows": [scan.max_rows for scan in scans],
    }
    pending = {name: [value] * len(scans) for name, value in PENDING.items()}
    return pa.table({**columns, **pending}, schema=STORE_SCHEMA)


def shard_slices(table: pa.Table) -> dict[int, slice]:
    """Which lines of `scans.parquet` belong to each shard, in order.

    Raises:
        StoreError: If the lines of a shard do not lie together.
    """
    index = table["shard"].to_numpy()
    if len(index) == 0:
        return {}
    if np.any(np.diff(index) < 0):
        raise StoreError("scans.parquet is damaged: its lines are not in the order of the shards")
    shards, first = np.unique(index, return_index=True)
    stops = [*first[1:].tolist(), len(index)]
    return {
        int(shard): slice(start, stop)
        for shard, start, stop in zip(shards, first.tolist(), stops, strict=True)
    }


def shard_of_lines(lines: pa.Table, *, chunk_rows: int) -> Shard:
    """The shard whose lines of `scans.parquet` these are."""
    columns = lines.select(["scan_id", "study_id", "patient_id", "view", "max_rows"])
    scans = tuple(ScanToStore(**line) for line in columns.to_pylist())
    return Shard(
        index=lines["shard"][0].as_py(),
        row_start=lines["row_start"][0].as_py(),
        n_rows=_whole_chunks(sum(scan.max_rows for scan in scans), chunk_rows),
        scans=scans,
    )


def planned_rows(table: pa.Table, *, chunk_rows: int) -> int:
    """Rows that the shards of a table take up, whole chunks."""
    if table.num_rows == 0:
        return 0
    last = table.num_rows - 1
    stop = table["row_start"][last].as_py() + table["max_rows"][last].as_py()
    return _whole_chunks(stop, chunk_rows)


def _check(scans: Sequence[ScanToStore], *, shard_scans: int) -> None:
    if shard_scans < 1:
        raise StoreError(f"a shard must have at least one scan, got shard_scans={shard_scans}")
    seen: set[tuple[str, int]] = set()
    for scan in scans:
        if scan.max_rows < 1:
            raise StoreError(
                f"scan {scan.scan_id!r} would get {scan.max_rows} rows: leave out scans of which "
                "no slice lies inside the grid"
            )
        if (scan.scan_id, scan.view) in seen:
            raise StoreError(
                f"scan {scan.scan_id!r} (view {scan.view}) occurs twice: each scan and view gets "
                "rows once"
            )
        seen.add((scan.scan_id, scan.view))


def _grouped(scans: Sequence[ScanToStore]) -> Mapping[str, list[ScanToStore]]:
    views: dict[str, list[ScanToStore]] = {}
    for scan in scans:
        views.setdefault(scan.scan_id, []).append(scan)
    return views


def _packed(
    views: Mapping[str, list[ScanToStore]], *, shard_scans: int
) -> Iterator[list[ScanToStore]]:
    members: list[ScanToStore] = []
    for group in views.values():
        if len(members) >= shard_scans:
            yield members
            members = []
        members.extend(group)
    if members:
        yield members


def _whole_chunks(rows: int, chunk_rows: int) -> int:
    return -(-rows // chunk_rows) * chunk_rows
