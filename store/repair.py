"""Rebuilding: from what verification found, to files written anew from the rest of a store.

Plan and `scans.parquet` each tell the other, the layout that both carry tells every `zarr.json`,
and `scans.parquet` tells the commit records. What nothing tells is rows: those of a shard whose
record is lost twice are taken back here, all others are for extraction to bring back.
"""

from dataclasses import dataclass
from itertools import accumulate

from ctfm.store.commits import COMMITS, commit_bytes, commit_name
from ctfm.store.errors import StoreError
from ctfm.store.layout import metadata_files
from ctfm.store.places import Place
from ctfm.store.plan import PENDING, planned_rows, shard_slices
from ctfm.store.shard_check import Problem, scans_of
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
class Rebuilt:
    """What was mended without a scan, and what was not."""

    files: tuple[str, ...]
    """Written anew."""
    shards: int
    """Shards that are pending now, because nothing tells what they held."""
    lost_scans: tuple[str, ...]
    """Scans of which rows are damaged."""
    left: tuple[Problem, ...]
    """What cannot be mended here or by extraction."""


def rebuild_store(place: Place, report: VerifyReport) -> Rebuilt:
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
    files: dict[str, None] = {}
    while mendable := [at for at in _files(report) if at in known and at not in files]:
        for name in mendable:
            place.publish(name, known[name])
        files |= dict.fromkeys(mendable)
        report = verify_store(place)  # rows are read only once the metadata of the arrays is whole
    records = [at for at in _files(report, rows_lost=True) if at.startswith(f"{COMMITS}/")]
    for name in records:
        place.delete(name)
    if SCANS in _files(report):
        publish_scans(place, merged(place, read_plan(place)))
        files[SCANS] = None
    return Rebuilt(
        files=tuple(files),
        shards=len(records),
        lost_scans=scans_of(
            one for one in report.problems if one.rows_lost and one.where not in records
        ),
        left=tuple(one for one in report.problems if not one.rows_lost and one.where not in files),
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
