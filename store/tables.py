"""The tables of a store: from plan and commit records, to one line a scan and view, and back.

`plan/<part>.parquet` says which rows each scan gets. A part is added (never replaced) when scans
are, by one writer of any number: whoever comes second reads it and plans again. `scans.parquet`
is the plan with the commit records merged in. It is written anew by everyone who finishes, and
can always be made again; whoever opens a store looks whether plan or records are newer.

Every table carries the layout of the store and a seal in the metadata of its footer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctfm.store.commits import commit_name, committed, read_commits
from ctfm.store.errors import StoreError
from ctfm.store.files import table_of
from ctfm.store.layout import StoreLayout
from ctfm.store.places import Place
from ctfm.store.plan import PENDING, PLAN_COLUMNS, STORE_SCHEMA, shard_slices
from ctfm.store.seals import OPEN_SEAL, is_sealed, seal

PLAN = "plan"
SCANS = "scans.parquet"

_METADATA = b"ctfm"
_PLAN_SCHEMA = pa.schema([STORE_SCHEMA.field(name) for name in PLAN_COLUMNS])


@dataclass(frozen=True, kw_only=True)
class StoreTable:
    """A table of a store as it lies there."""

    lines: pa.Table
    """`STORE_SCHEMA`, in order of rows; a plan's are all pending."""
    layout: StoreLayout
    parts: tuple[int, ...]
    """How many of its lines come from each part of the plan."""


def part_numbers(place: Place) -> list[int]:
    """Parts that the plan has; 0, 1, … in a store that is whole."""
    names = place.names(PLAN)
    return [int(name[:-8]) for name in names if re.fullmatch(r"\d{6,}\.parquet", name)]


def part_name(part: int) -> str:
    """File of a part of the plan."""
    return f"{PLAN}/{part:06d}.parquet"


def part_bytes(lines: pa.Table, layout: StoreLayout) -> bytes:
    """File of a part of the plan; the same lines give the same bytes with the same pyarrow."""
    return _table_bytes(lines.select(PLAN_COLUMNS), {"layout": layout.to_json()})


def read_part(place: Place, part: int) -> StoreTable:
    """One part of the plan.

    Raises:
        StoreError: If it is not, to the bit, what was published.
    """
    return _parsed_part(place, part, place.read(part_name(part)))


def read_plan(place: Place) -> StoreTable:
    """The whole plan.

    Raises:
        StoreError: If a part is damaged or missing.
    """
    n_parts = max(part_numbers(place), default=0) + 1
    contents = place.read_many([part_name(part) for part in range(n_parts)])
    return joined([_parsed_part(place, part, content) for part, content in enumerate(contents)])


def joined(parts: Sequence[StoreTable]) -> StoreTable:
    """The plan whose parts these are, all of them in their order."""
    lines = pa.concat_tables([part.lines for part in parts]).combine_chunks()
    counts = tuple(part.lines.num_rows for part in parts)
    return StoreTable(lines=lines, layout=parts[0].layout, parts=counts)


def all_pending(table: StoreTable) -> StoreTable:
    """A table without any result."""
    return replace(table, lines=_pending(table.lines))


def read_scans(place: Place) -> StoreTable:
    """`scans.parquet` as it lies there: plan and commit records may be newer.

    Raises:
        StoreError: If it is not, to the bit, what was published.
    """
    lines, about = _parsed(place, SCANS, place.read(SCANS), schema=STORE_SCHEMA)
    layout = StoreLayout.from_json(about["layout"])
    return StoreTable(lines=lines, layout=layout, parts=tuple(about["parts"]))


def publish_scans(place: Place, table: StoreTable) -> None:
    """Publish `scans.parquet`, unless it is there to the byte."""
    about = {"layout": table.layout.to_json(), "parts": table.parts}
    content = _table_bytes(table.lines, about)
    if not place.has(SCANS) or place.read(SCANS) != content:
        place.publish(SCANS, content)


def is_begun(place: Place) -> bool:
    """Whether there is a plan and no commit record: what is missing beside it was not made yet.

    Whoever makes a store may be killed between any two of its files; `FeatureStore.create` goes on.
    """
    return place.has(part_name(0)) and not committed(place)


def current_scans(place: Place) -> StoreTable:
    """`scans.parquet` with everything that is newer merged in.

    Raises:
        StoreError: If a file that has to be read is damaged, or of another store.
    """
    if not place.has(SCANS) and is_begun(place):
        return read_plan(place)
    stored = read_scans(place)
    if len(stored.parts) == len(part_numbers(place)):
        return merged(place, stored)
    plan = read_plan(place)
    new = plan.lines.slice(stored.lines.num_rows)
    lines = pa.concat_tables([stored.lines, new]).combine_chunks()
    return merged(place, StoreTable(lines=lines, layout=plan.layout, parts=plan.parts))


def merged(place: Place, table: StoreTable) -> StoreTable:
    """A table with the commit records merged in; only those that it lacks are read.

    Raises:
        StoreError: If a record is damaged or belongs to another plan.
    """
    lines = table.lines
    done, slices = committed(place), shard_slices(lines)
    waiting = set(lines.filter(pc.equal(lines["status"], "pending"))["shard"].to_pylist())
    stale = [shard for shard in slices if (shard in done) == (shard in waiting)]
    if not stale:
        return table
    records = read_commits(place, [shard for shard in stale if shard in done])
    ids, views = lines["scan_id"].to_pylist(), lines["view"].to_pylist()
    for shard, record in records.items():
        own = slices[shard]
        if record["scan_id"] != ids[own] or record["view"] != views[own]:
            raise StoreError(
                f"{place.path}/{commit_name(shard)} lists other scans than the plan: one of them "
                "is from another store. Put back the right one, or extract again to a new store"
            )
    results = {shard: records.get(shard) for shard in stale}
    return replace(table, lines=with_results(lines, results))


def with_results(
    lines: pa.Table, results: Mapping[int, Mapping[str, Sequence[Any]] | None]
) -> pa.Table:
    """Lines with the results of some shards put in, or taken back.

    Args:
        lines: Of a store.
        results: Commit records by shard; None makes its lines pending.
    """
    columns = {name: lines[name].to_pylist() for name in PENDING}
    for shard, own in shard_slices(lines).items():
        if shard in results:
            record = results[shard]
            for name, pending in PENDING.items():
                n = own.stop - own.start
                columns[name][own] = [pending] * n if record is None else record[name]
    for name, values in columns.items():
        position = STORE_SCHEMA.get_field_index(name)
        field = STORE_SCHEMA.field(position)
        lines = lines.set_column(position, field, pa.array(values, type=field.type))
    return lines.combine_chunks()


def _parsed_part(place: Place, part: int, content: bytes) -> StoreTable:
    table, about = _parsed(place, part_name(part), content, schema=_PLAN_SCHEMA)
    layout = StoreLayout.from_json(about["layout"])
    return StoreTable(lines=_pending(table), layout=layout, parts=(table.num_rows,))


def _pending(plan: pa.Table) -> pa.Table:
    n = plan.num_rows
    columns = {name: plan[name] for name in PLAN_COLUMNS}
    columns |= {name: pa.array([value] * n) for name, value in PENDING.items()}
    return pa.table({name: columns[name] for name in STORE_SCHEMA.names}).cast(STORE_SCHEMA)


def _table_bytes(table: pa.Table, about: Mapping[str, Any]) -> bytes:
    metadata = {_METADATA: json.dumps({**about, "seal": OPEN_SEAL}, separators=(",", ":"))}
    sink = pa.BufferOutputStream()
    # Arrow's own schema would hold the metadata a second time, with the seal still open.
    with pq.ParquetWriter(sink, table.schema, store_schema=False, write_page_checksum=True) as file:
        file.write_table(table)
        file.add_key_value_metadata(metadata)
    return seal(sink.getvalue().to_pybytes())


def _parsed(
    place: Place, name: str, content: bytes, *, schema: pa.Schema
) -> tuple[pa.Table, dict[str, Any]]:
    """A sealed table and what its metadata say."""
    if not is_sealed(content):
        raise StoreError(
            f"{place.path}/{name} is damaged: `ctfm store verify --repair` writes it anew"
        )
    table = table_of(content)
    about: dict[str, Any] = json.loads(table.schema.metadata[_METADATA])
    return table.select(schema.names).cast(schema).combine_chunks(), about
