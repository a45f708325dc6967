"""Growth: scans that are to be stored, to a plan that other processes may add to at the same time.

The plan is made of parts, each published whole and never changed; the first one makes the store.
"""

from collections.abc import Sequence

import pyarrow as pa

from ctfm.store.commits import COMMITS, sealed_json, unsealed_json
from ctfm.store.errors import StoreError
from ctfm.store.layout import GROUP, StoreHeader, StoreLayout, metadata_files
from ctfm.store.places import Place
from ctfm.store.plan import (
    ScanToStore,
    plan_shards,
    plan_table,
    planned_rows,
    rows_per_chunk,
    shard_slices,
)
from ctfm.store.tables import PLAN, StoreTable, part_bytes, part_name, read_plan
from ctfm.store.verify import IDS


def begin(
    place: Place,
    header: StoreHeader,
    *,
    scans: Sequence[ScanToStore],
    shard_scans: int,
    compress: bool,
    ids: str | None,
) -> None:
    """Publish the first part of the plan, unless another process does; from then on it counts."""
    if not scans:
        raise StoreError(
            f"there is no scan for {place.path}: the catalogue has none that is usable"
        )
    foreign = any(name != IDS for name, _ in place.files())
    if foreign and not place.has(part_name(0)):
        raise StoreError(f"{place.path} exists and is not a feature store: choose another folder")
    most_rows = shard_scans * max(scan.max_rows for scan in scans)
    chunk_rows = rows_per_chunk(header.row_bytes, shard_rows=most_rows)
    layout = StoreLayout(header=header, chunk_rows=chunk_rows, compress=compress)
    shards = plan_shards(scans, chunk_rows=chunk_rows, shard_scans=shard_scans)
    place.prepare(_folders(layout))
    claim_ids(place, ids)
    place.add(part_name(0), part_bytes(plan_table(shards), layout))


def claim_ids(place: Place, ids: str | None) -> None:
    """Refuse ids that were made otherwise than those of the store: a patient would have two."""
    if ids is None:
        return
    mine = sealed_json({"keys": [ids]})
    if not place.has(IDS) and place.add(IDS, mine):
        return
    record = unsealed_json(place.read(IDS))
    if record is None:
        place.publish(IDS, mine)
    elif ids not in (known := record["keys"]):
        raise StoreError(
            f"{place.path} holds ids that were made with another key ({', '.join(known)}, of this "
            f"catalogue {ids}), so a patient could have two: use the catalogue that it was made "
            "from (`ctfm index --out` keeps the key of the one that it replaces), or extract to a "
            "new store"
        )


def add_metadata(place: Place, plan: StoreTable) -> None:
    """Make the Zarr group, without a single chunk; its own file comes last."""
    place.prepare(_folders(plan.layout))
    n_rows = planned_rows(plan.lines, chunk_rows=plan.layout.chunk_rows)
    for name, content in metadata_files(plan.layout, n_rows=n_rows).items():
        place.add(name, content)


def extend(
    place: Place, plan: StoreTable, scans: Sequence[ScanToStore], *, shard_scans: int
) -> StoreTable:
    """Add to the plan what it lacks.

    Returns:
        The plan that counts now, with what other processes added.

    Raises:
        StoreError: If a scan is in the store under another study or patient.
    """
    place.prepare(_folders(plan.layout))
    while new := _not_in(plan.lines, scans):
        chunk_rows = plan.layout.chunk_rows
        shards = plan_shards(
            new,
            chunk_rows=chunk_rows,
            shard_scans=shard_scans,
            first_index=max(shard_slices(plan.lines)) + 1,
            first_row=planned_rows(plan.lines, chunk_rows=chunk_rows),
        )
        # Where another process was quicker, its part is read and there is less to add.
        place.add(part_name(len(plan.parts)), part_bytes(plan_table(shards), plan.layout))
        plan = read_plan(place)
    return plan


def _folders(layout: StoreLayout) -> list[str]:
    return ["", PLAN, COMMITS, GROUP, *(f"{GROUP}/{name}" for name in layout.arrays)]


def _not_in(table: pa.Table, scans: Sequence[ScanToStore]) -> list[ScanToStore]:
    """Scans that the plan lacks; those that it has must belong to the same patient."""
    columns = [table[name].to_pylist() for name in ("scan_id", "view", "study_id", "patient_id")]
    known = {(scan, view): owner for scan, view, *owner in zip(*columns, strict=True)}
    new = []
    for scan in scans:
        owner = known.get((scan.scan_id, scan.view))
        if owner is None:
            new.append(scan)
        elif owner != [scan.study_id, scan.patient_id]:
            raise StoreError(
                f"scan {scan.scan_id!r} is in the store as study {owner[0]!r} of patient "
                f"{owner[1]!r}, and now as study {scan.study_id!r} of patient {scan.patient_id!r}: "
                "use the catalogue that the store was made from, or extract to a new store"
            )
    return new
