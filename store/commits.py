"""Commit records: from the results of a shard, to one small file that says that it is done.

`commits/<shard>.json` is published after the chunks of the shard are on the disk. It holds the
results column by column in the order of the plan, and ends with the SHA-256 of all before it. A
shard without a record does not count, whatever its chunks hold. `scans.parquet` is the plan
with the records merged in, and `commits/scans.json` holds the digests of its latest versions.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctfm.store.errors import StoreError
from ctfm.store.files import parquet_bytes, publish_bytes, writing
from ctfm.store.plan import STORE_SCHEMA, shard_slices
from ctfm.store.provenance import canonical_json

COMMITS = "commits"
SCANS = "scans.parquet"

RESULT_COLUMNS = ("n_rows", "status", "reason", "detail", "sha256")
"""What extraction adds to the plan."""

_SEAL = re.compile(rb'(.*),"seal":"([0-9a-f]{64})"}', re.DOTALL)
_PENDING = {"n_rows": 0, "status": "pending", "reason": "", "detail": "", "sha256": ""}
_KEPT_DIGESTS = 16


def committed(store: Path) -> set[int]:
    """Shards that have a commit record."""
    try:
        names = [entry.name for entry in (store / COMMITS).iterdir()]
    except OSError as error:
        raise StoreError(
            f"{store / COMMITS} cannot be read ({error.strerror}): a feature store needs that "
            "folder. Restore it, or extract again to a new store"
        ) from error
    return {int(name[:-5]) for name in names if re.fullmatch(r"\d{6,}\.json", name)}


def commit_path(store: Path, shard: int) -> Path:
    """Where the commit record of a shard lies."""
    return store / COMMITS / f"{shard:06d}.json"


def publish_commit(store: Path, shard: int, results: Mapping[str, Sequence[Any]]) -> None:
    """Declare a shard done.

    Args:
        store: Folder of the store.
        shard: Index of the shard.
        results: `scan_id`, `view` and the `RESULT_COLUMNS`, in the order of the plan.
    """
    publish_bytes(commit_path(store, shard), _sealed({"shard": shard, **results}))


def read_commit(store: Path, shard: int) -> dict[str, list[Any]]:
    """What `publish_commit` was given.

    Raises:
        StoreError: If the record is not, to the byte, what was published.
    """
    path = commit_path(store, shard)
    record = _unsealed(path)
    if record.pop("shard") != shard:
        raise _damaged(path)
    return record


def read_scans(store: Path) -> pa.Table:
    """`scans.parquet` as it lies there: commit records may be newer.

    Raises:
        StoreError: If it cannot be read, or has other columns.
    """
    path = store / SCANS
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        return table.select(STORE_SCHEMA.names).cast(STORE_SCHEMA).combine_chunks()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"{path} is damaged or missing ({error}): restore it, or extract again to a new store"
        ) from error


def publish_scans(store: Path, table: pa.Table) -> None:
    """Publish `scans.parquet`; its digest is published first, beside the digests before it.

    Killed in between, the old file is still one of those that `scans_are_intact` accepts.
    """
    content = parquet_bytes(table)
    path = store / COMMITS / "scans.json"
    known = [_bytes_sha256(content), *_known_digests(store)]
    publish_bytes(path, _sealed({"sha256": list(dict.fromkeys(known))[:_KEPT_DIGESTS]}))
    publish_bytes(store / SCANS, content)


def scans_are_intact(store: Path) -> bool:
    """Whether `scans.parquet` is, to the byte, one that was published.

    Raises:
        StoreError: If it, or the record of its digests, cannot be read.
    """
    path = store / SCANS
    known = _unsealed(store / COMMITS / "scans.json")["sha256"]
    try:
        return _bytes_sha256(path.read_bytes()) in known
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def merge(store: Path, table: pa.Table, *, reread: bool = False) -> pa.Table:
    """`scans.parquet` with the commit records merged in.

    Args:
        store: Folder of the store.
        table: As `read_scans` gave it.
        reread: Read every record, also those that the table has already.

    Raises:
        StoreError: If a record is damaged or belongs to another plan.
    """
    done, slices = committed(store), shard_slices(table)
    waiting = set(table.filter(pc.equal(table["status"], "pending"))["shard"].to_pylist())
    stale = {shard for shard in slices if (shard in done) == (shard in waiting)}
    if not stale and not reread:
        return table
    ids, views = table["scan_id"].to_pylist(), table["view"].to_pylist()
    kept = {name: table[name].to_pylist() for name in RESULT_COLUMNS}
    merged: dict[str, list[Any]] = {name: [] for name in RESULT_COLUMNS}
    for shard, lines in slices.items():
        results: dict[str, list[Any]]
        if shard not in done:
            results = {name: [_PENDING[name]] * len(ids[lines]) for name in RESULT_COLUMNS}
        elif reread or shard in stale:
            results = read_commit(store, shard)
            if results["scan_id"] != ids[lines] or results["view"] != views[lines]:
                raise _of_another_plan(store, shard)
        else:
            results = {name: kept[name][lines] for name in RESULT_COLUMNS}
        for name in RESULT_COLUMNS:
            merged[name].extend(results[name])
    return _replaced(table, merged)


def without_results(table: pa.Table, shards: set[int]) -> pa.Table:
    """The table with the results of some shards taken back."""
    taken = [shard in shards for shard in table["shard"].to_pylist()]
    columns = {
        name: [
            _PENDING[name] if pending else value
            for value, pending in zip(table[name].to_pylist(), taken, strict=True)
        ]
        for name in RESULT_COLUMNS
    }
    return _replaced(table, columns)


def drop_commits(store: Path, shards: set[int]) -> None:
    """Remove commit records; their shards count as never done."""
    with writing(store / COMMITS):
        for shard in sorted(shards):
            commit_path(store, shard).unlink(missing_ok=True)


def _replaced(table: pa.Table, columns: Mapping[str, list[Any]]) -> pa.Table:
    for name, values in columns.items():
        position = STORE_SCHEMA.get_field_index(name)
        field = STORE_SCHEMA.field(position)
        table = table.set_column(position, field, pa.array(values, type=field.type))
    return table.combine_chunks()


def _sealed(record: Mapping[str, Any]) -> bytes:
    body = canonical_json(dict(record))
    return f'{body[:-1]},"seal":"{_bytes_sha256(body.encode())}"}}'.encode()


def _unsealed(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    match = _SEAL.fullmatch(content)
    if match is None or _bytes_sha256(match[1] + b"}") != match[2].decode():
        raise _damaged(path)
    record: dict[str, Any] = json.loads(match[1] + b"}")
    return record


def _known_digests(store: Path) -> list[str]:
    try:
        known: list[str] = _unsealed(store / COMMITS / "scans.json")["sha256"]
    except StoreError:
        return []
    return known


def _bytes_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"{path} is damaged: delete that file and run `ctfm extract` again, which redoes its shard"
    )


def _of_another_plan(store: Path, shard: int) -> StoreError:
    return StoreError(
        f"{commit_path(store, shard)} lists other scans than scans.parquet: one of them is from "
        "another store. Put back the right one, or extract again to a new store"
    )
