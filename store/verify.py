"""Verification: from a feature store, to every scan whose bytes are not those that were committed.

Every byte is read again: plan, `scans.parquet`, commit records, `zarr.json` files, `adapter.json`
and `weights.json` against the seals in them and against each other, each chunk (with the rows that
no scan uses) against its CRC-32C, the rows of each scan against the SHA-256 in the commit record.
Chunks of shards that are still pending do not count: they will be written again.

What concerns the whole store names all its scans, though no row of them need be wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from ctfm.store.commits import commit_name, committed, unsealed_json
from ctfm.store.embeddings import open_array
from ctfm.store.errors import PlaceError, StoreError
from ctfm.store.layout import GROUP, metadata_name, read_metadata
from ctfm.store.places import Place
from ctfm.store.plan import PLAN_COLUMNS, planned_rows, shard_slices
from ctfm.store.shard_check import (
    CHANGED,
    MISSING,
    Problem,
    ShardCheck,
    StoreToCheck,
    check_shard,
    scans_of,
)
from ctfm.store.tables import (
    PLAN,
    SCANS,
    StoreTable,
    all_pending,
    is_begun,
    joined,
    part_name,
    part_numbers,
    read_part,
    read_scans,
)

T = TypeVar("T")

ADAPTER = "adapter.json"
"""What is known of the LoRA adapter of a backbone, sealed like a commit record."""

ADAPTER_SETTING = "backbone_adapter"
"""Of the settings: digest of that adapter. Its store has the file."""

WEIGHTS = "weights.json"
"""Where on a hub the weights are from, sealed likewise."""

IDS = "ids.json"
"""Which keys made the ids, sealed likewise."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a whole reading of a store found."""

    scans: int
    """Lines of the plan: scans and their views."""
    pending: int
    """Of these, not extracted yet; that is no problem."""
    failed: int
    """Of these, recorded with a reason why they have no rows; no problem either."""
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
        """Scans that a problem concerns, sorted."""
        return scans_of(self.problems)

    @property
    def lost_scans(self) -> tuple[str, ...]:
        """Scans whose rows have to be extracted again, sorted."""
        return scans_of(problem for problem in self.problems if problem.rows_lost)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """The tables of a store, as far as they can be trusted."""

    plan: StoreTable | None
    """All pending; from `scans.parquet` where a part of the plan is damaged."""
    stored: StoreTable | None
    """`scans.parquet`."""
    damage: dict[str, str]
    """What is wrong, by file."""

    def stored_lines(self, own: slice) -> pa.Table | None:
        """Lines of `scans.parquet`, if it has them."""
        if self.stored is None or own.stop > self.stored.lines.num_rows:
            return None
        return self.stored.lines[own]


def verify_store(place: Place) -> VerifyReport:
    """Read a whole store again and compare it with what was committed.

    Args:
        place: Of the store; nothing in it has to be whole.

    Raises:
        StoreError: If there is no store.
        PlaceError: If it may not be read or does not answer, which says nothing about the store.
    """
    tables = read_tables(place)
    if tables.plan is None:
        if set(tables.damage.values()) == {MISSING}:
            raise StoreError(f"{place.path} is not a feature store: `ctfm extract` makes one")
        return _report([], [Problem(where=at, what=what) for at, what in tables.damage.items()])
    lines = tables.plan.lines
    damage = (
        tables.damage
        | _metadata_damage(place, tables.plan)
        | _record_damage(place, tables.plan.layout.header.settings)
    )
    readable = not any(at.startswith(f"{GROUP}/") for at in damage)
    if is_begun(place):
        not_yet = {SCANS, ADAPTER, *map(metadata_name, ["", *tables.plan.layout.arrays])}
        damage = {at: what for at, what in damage.items() if at not in not_yet or place.has(at)}
    everyone = tuple(dict.fromkeys(lines["scan_id"].to_pylist()))
    problems = [Problem(where=at, what=what, scan_ids=everyone) for at, what in damage.items()]
    names = tables.plan.layout.arrays if readable else []
    store = StoreToCheck(
        place=place,
        arrays={name: open_array(place, name) for name in names},
        done=committed(place),
        chunk_rows=tables.plan.layout.chunk_rows,
    )
    slices = shard_slices(lines)
    for shard in sorted(store.done - slices.keys()):
        problems.append(Problem(where=commit_name(shard), what="belongs to no planned shard"))
    checks = [check_shard(store, lines[own], tables.stored_lines(own)) for own in slices.values()]
    return _report(checks, problems)


def read_tables(place: Place) -> Tables:
    """Read the plan and `scans.parquet`, whatever state they are in."""
    damage: dict[str, str] = {}
    stored = _intact(place, SCANS, partial(read_scans, place), damage=damage)
    numbers = _intact(place, PLAN, partial(part_numbers, place), damage=damage) or []
    n_parts = max([0 if stored is None else len(stored.parts), *(i + 1 for i in numbers)])
    read = [
        _intact(place, part_name(i), partial(read_part, place, i), damage=damage)
        for i in range(n_parts)
    ]
    parts = [part for part in read if part is not None]
    plan = None if stored is None else all_pending(stored)
    if parts and len(parts) == n_parts:
        plan = joined(parts)
    if plan and stored and not _starts_with(plan, stored):
        damage[SCANS] = f"has another plan than {PLAN}/"
        stored = None
    return Tables(plan=plan, stored=stored, damage=damage)


def _intact(place: Place, name: str, read: Callable[[], T], *, damage: dict[str, str]) -> T | None:
    """What is read; None, and a word in `damage`, if it is not what was published."""
    try:
        return read()
    except PlaceError:
        raise
    except StoreError:
        damage[name] = CHANGED if place.has(name) else MISSING
        return None


def _starts_with(plan: StoreTable, stored: StoreTable) -> bool:
    planned = plan.lines.slice(0, stored.lines.num_rows)
    return bool(planned.select(PLAN_COLUMNS).equals(stored.lines.select(PLAN_COLUMNS)))


def _metadata_damage(place: Place, plan: StoreTable) -> dict[str, str]:
    layout, damage = plan.layout, dict[str, str]()
    # Arrays grow after the plan: one that lacks rows of pending shards alone is not damaged.
    done = pa.array(sorted(committed(place)), plan.lines["shard"].type)
    kept = plan.lines.filter(pc.is_in(plan.lines["shard"], value_set=done))
    n_rows = planned_rows(kept, chunk_rows=layout.chunk_rows) if kept.num_rows else 0
    for name in ["", *layout.arrays]:
        file = metadata_name(name)
        found = _intact(place, file, partial(read_metadata, place, name), damage=damage)
        if found and name and found["shape"][0] < n_rows:
            damage[file] = f"has {found['shape'][0]} rows, planned are {n_rows}"
        elif found and not name and found["attributes"]["ctfm"] != layout.header.to_attributes():
            damage[file] = "is that of another store"
    return damage


def _record_damage(place: Place, settings: Mapping[str, Any]) -> dict[str, str]:
    damage = {
        name: CHANGED
        for name in (ADAPTER, WEIGHTS, IDS)
        if place.has(name) and unsealed_json(place.read(name)) is None
    }
    if ADAPTER_SETTING in settings and not place.has(ADAPTER):
        damage[ADAPTER] = MISSING
    return {
        name: f"{what}; `ctfm extract` with the options of before writes it anew"
        for name, what in damage.items()
    }


def _report(checks: Sequence[ShardCheck], problems: Sequence[Problem]) -> VerifyReport:
    statuses = [status for check in checks for status in check.statuses]
    return VerifyReport(
        scans=len(statuses),
        pending=statuses.count("pending"),
        failed=statuses.count("failed"),
        rows=sum(check.n_rows for check in checks),
        bytes_read=sum(check.bytes_read for check in checks),
        problems=(*problems, *(problem for check in checks for problem in check.problems)),
    )
