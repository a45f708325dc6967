"""Repair: from what verification found, to a store that is whole, or knows what it lacks.

What the rest of the store tells is written anew: plan and `scans.parquet` each from the other,
`zarr.json` from the layout that both carry, a commit record from `scans.parquet`. Rows that are
lost are taken back: their shards count as never done, and the next extraction does them again.
"""

from dataclasses import dataclass
from itertools import accumulate

from ctfm.store.commits import COMMITS, commit_bytes, commit_name
from ctfm.store.errors import StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.layout import metadata_files
from ctfm.store.places import Place
from ctfm.store.plan import PENDING, planned_rows, shard_slices
from ctfm.store.shard_check import Problem
from ctfm.store.tables import (
    SCANS,
    StoreTable,
    merged,
    part_bytes,
    part_name,
    publish_scans,
    read_plan,
)
from ctfm.store.verify import VerifyReport, read_tables, verify_store


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What a repair did."""

    rebuilt: tuple[str, ...]
    """Files that it wrote anew from the rest of the store."""
    lost_scans: tuple[str, ...]
    """Scans whose rows have to be extracted again."""
    shards: int
    """Shards of these, which are pending now."""
    left: tuple[Problem, ...]
    """What it could not mend."""


def repair_store(place: Place, report: VerifyReport) -> Repaired:
    """Mend a store as far as it tells by itself what was in it.

    Args:
        place: Of the store.
        report: What `verify_store` found; it is called again after files were written.

    Raises:
        StoreError: If neither plan nor `scans.parquet` can be read, or nothing can be written.
    """
    tables = read_tables(place)
    if tables.plan is None:
        raise StoreError(
            f"neither the plan of {place.path} nor its {SCANS} can be read: restore one of them, "
            "or extract again to a new store"
        )
    known = _metadata(tables.plan) | ({} if tables.stored is None else _told_by(tables.stored))
    rebuilt: dict[str, None] = {}
    while mendable := [at for at in _files(report) if at in known and at not in rebuilt]:
        for name in mendable:
            place.publish(name, known[name])
        rebuilt |= dict.fromkeys(mendable)
        report = verify_store(place)  # rows are read only once the metadata of the arrays is whole
    lost = [at for at in _files(report, rows_lost=True) if at.startswith(f"{COMMITS}/")]
    for name in lost:
        place.delete(name)
    if SCANS in _files(report):
        publish_scans(place, merged(place, read_plan(place)))
        rebuilt[SCANS] = None
    shards = FeatureStore.open(place.path).take_back(report.lost_scans)
    left = [one for one in report.problems if not one.rows_lost and one.where not in rebuilt]
    return Repaired(
        rebuilt=tuple(rebuilt),
        lost_scans=report.lost_scans,
        shards=shards + len(lost),
        left=tuple(left),
    )


def _files(report: VerifyReport, *, rows_lost: bool = False) -> list[str]:
    return [problem.where for problem in report.problems if problem.rows_lost == rows_lost]


def _metadata(plan: StoreTable) -> dict[str, bytes]:
    """Files of the Zarr group, but for its chunks."""
    n_rows = planned_rows(plan.lines, chunk_rows=plan.layout.chunk_rows)
    return metadata_files(plan.layout, n_rows=n_rows)


def _told_by(stored: StoreTable) -> dict[str, bytes]:
    """Parts of the plan and commit records, as `scans.parquet` tells them."""
    lines, known = stored.lines, {}
    stops = accumulate(stored.parts)
    for part, (n_lines, stop) in enumerate(zip(stored.parts, stops, strict=True)):
        known[part_name(part)] = part_bytes(lines[stop - n_lines : stop], stored.layout)
    for shard, own in shard_slices(lines).items():
        results = lines[own].select(["scan_id", "view", *PENDING]).to_pydict()
        if "pending" not in results["status"]:
            known[commit_name(shard)] = commit_bytes(shard, results)
    return known
