"""Commit records: from the results of a shard, to one small file that says that it is done.

`commits/<shard>.json` is published after the chunks of the shard are on the disk. It holds the
results column by column in the order of the plan, and a seal. A shard without a record does not
count, whatever its chunks hold.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.places import Place
from ctfm.store.provenance import canonical_json
from ctfm.store.seals import OPEN_SEAL, is_sealed, seal

COMMITS = "commits"


def committed(place: Place) -> set[int]:
    """Shards that have a commit record."""
    names = place.names(COMMITS)
    return {int(name[:-5]) for name in names if re.fullmatch(r"\d{6,}\.json", name)}


def commit_name(shard: int) -> str:
    """File of the commit record of a shard."""
    return f"{COMMITS}/{shard:06d}.json"


def add_commit(place: Place, shard: int, results: Mapping[str, Sequence[Any]]) -> bool:
    """Declare a shard done, unless another process has.

    Args:
        place: Of the store.
        shard: Index of the shard.
        results: `scan_id`, `view` and the columns of `PENDING`, in the order of the plan.

    Returns:
        Whether the record is this one; otherwise that of the other process stands.
    """
    return place.add(commit_name(shard), commit_bytes(shard, results))


def commit_bytes(shard: int, results: Mapping[str, Sequence[Any]]) -> bytes:
    """File of a commit record; the same results give the same bytes."""
    return sealed_json({"shard": shard, **results})


def read_commits(place: Place, shards: Sequence[int]) -> dict[int, dict[str, list[Any]]]:
    """What `add_commit` was given for some shards, but for those that are taken back meanwhile.

    Raises:
        StoreError: If a record is not, to the bit, what was published.
    """
    contents = place.read_many([commit_name(shard) for shard in shards])
    try:
        return {
            shard: parse_commit(place, shard, content)
            for shard, content in zip(shards, contents, strict=True)
        }
    except PlaceError:
        raise
    except StoreError:
        there = committed(place)
        if there.issuperset(shards):
            raise
        return read_commits(place, [shard for shard in shards if shard in there])


def parse_commit(place: Place, shard: int, content: bytes) -> dict[str, list[Any]]:
    """One record.

    Raises:
        StoreError: If it is not, to the bit, what was published.
    """
    record = unsealed_json(content)
    if record is None or record.pop("shard") != shard:
        raise StoreError(
            f"{place.path}/{commit_name(shard)} is damaged: `ctfm store verify --repair` mends "
            "the store"
        )
    return record


def drop_commits(place: Place, shards: Collection[int]) -> None:
    """Remove commit records; their shards count as never done."""
    for shard in sorted(shards):
        place.delete(commit_name(shard))


def sealed_json(record: Mapping[str, Any]) -> bytes:
    """A record as a JSON file with a seal."""
    return seal(canonical_json({**record, "seal": OPEN_SEAL}).encode())


def unsealed_json(content: bytes) -> dict[str, Any] | None:
    """The record that `sealed_json` was given; None if its file was changed since."""
    if not is_sealed(content):
        return None
    record: dict[str, Any] = json.loads(content)
    del record["seal"]
    return record
