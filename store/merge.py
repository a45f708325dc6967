"""Merge: from stores of one fingerprint, to one store with the scans of all.

The result has a plan of its own and is filled shard by shard as by an extraction, with rows that
are compared with their digests while they are copied. What is killed is resumed by merging again,
and nothing unfinished is taken for finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ctfm.store.errors import StoreError
from ctfm.store.features import FeatureStore
from ctfm.store.plan import SHARD_SCANS, STORE_SCHEMA, ScanToStore, Shard
from ctfm.store.results import ScanResult


@dataclass(frozen=True)
class _Found:
    """A scan and view in one of the stores."""

    store: FeatureStore
    line: Mapping[str, Any]
    """Of its table."""


_Chosen = dict[tuple[str, int], _Found]


def merge_stores(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    shard_scans: int = SHARD_SCANS,
    compress: bool = False,
    progress: Callable[[int], None] = lambda n_scans: None,
) -> FeatureStore:
    """Copy the scans of several stores into one.

    A scan that several stores have is copied once; its rows must be the same in all. One that
    failed in some and is ok in another is ok, unless `out` has it as failed already. The same call
    again does what is left, or nothing.

    Args:
        sources: Stores of the same settings, finished.
        out: The store to make or to extend; it may be one of the sources.
        shard_scans: Scans of a (new) shard.
        compress: Zstandard, for a new store.
        progress: Told the scans of every shard that is done.

    Raises:
        StoreError: If the stores do not go together (which, and why), one is unfinished or
            damaged, or the result cannot be written.
    """
    stores = [FeatureStore.open(source) for source in sources]
    if not stores:
        raise StoreError("there is nothing to merge: give one store or more")
    for store in stores[1:]:
        _refuse_other_settings(stores[0], store)
    chosen = _choose(stores)
    first = stores[0]
    if FeatureStore.exists(out):
        _refuse_unfinished(FeatureStore.open(out), chosen)
    merged = FeatureStore.create(
        out,
        settings=first.settings,
        tokens=first.tokens,
        dtype=first.dtype,
        scans=[_to_store(found.line) for found in chosen.values()],
        shard_scans=shard_scans,
        compress=compress,
    )
    _refuse_other_rows(merged, chosen)
    _copy_records(stores, merged)
    for shard in merged.pending_shards():
        merged.write_shard(shard, _results(shard, chosen))
        progress(len(shard.scans))
    merged.finish()
    return merged


def _refuse_other_settings(first: FeatureStore, other: FeatureStore) -> None:
    if differences := first.differences(other):
        raise StoreError(
            f"{first.path} and {other.path} were made with other settings, and rows of two "
            f"settings do not mix: {'; '.join(differences)} (in {other.path})"
        )


def _choose(stores: Sequence[FeatureStore]) -> _Chosen:
    """Of each scan and view the store to take it from."""
    chosen: _Chosen = {}
    for store in stores:
        for line in store.scans.to_pylist():
            key = (line["scan_id"], line["view"])
            found, before = _Found(store, line), chosen.get(key)
            if before is not None:
                _refuse_conflict(before, found)
            if before is None or _better(line, before.line):
                chosen[key] = found
    pending = [found for found in chosen.values() if found.line["status"] == "pending"]
    if pending:
        raise StoreError(
            f"{len(pending)} scans are still pending, e.g. {pending[0].line['scan_id']!r} in "
            f"{pending[0].store.path}: run `ctfm extract` on that store again, then merge"
        )
    return chosen


def _better(line: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    order = ("pending", "failed", "ok")
    return order.index(line["status"]) > order.index(before["status"])


def _refuse_conflict(one: _Found, other: _Found) -> None:
    """Two stores must say the same of a scan, unless it failed in one."""
    where = f"in {one.store.path} and in {other.store.path}"
    scan_id = one.line["scan_id"]
    for name in ("study_id", "patient_id"):
        if one.line[name] != other.line[name]:
            raise StoreError(
                f"scan {scan_id!r} has {name} {one.line[name]!r} and {other.line[name]!r} {where}: "
                "their catalogues were made with other keys. Index all scans with one"
            )
    both_ok = one.line["status"] == other.line["status"] == "ok"
    if both_ok and one.line["sha256"] != other.line["sha256"]:
        raise StoreError(
            f"scan {scan_id!r} has other rows {where}: it was extracted on other devices or from "
            "other files. Leave one of the stores out"
        )


def _refuse_other_rows(merged: FeatureStore, chosen: _Chosen) -> None:
    """What is in the result already must be what would be copied."""
    for line in merged.scans.to_pylist():
        found = chosen.get((line["scan_id"], line["view"]))
        if found is not None:
            _refuse_conflict(_Found(merged, line), found)


def _refuse_unfinished(merged: FeatureStore, chosen: _Chosen) -> None:
    """Shards that are pending in the result can only be filled from the stores."""
    for shard in merged.pending_shards():
        if missing := [s for s in shard.scans if (s.scan_id, s.view) not in chosen]:
            raise StoreError(
                f"{merged.path} has pending scans that none of the stores has, e.g. "
                f"{missing[0].scan_id!r}: run the extraction that began it to its end first"
            )


def _to_store(line: Mapping[str, Any]) -> ScanToStore:
    names = ("scan_id", "study_id", "patient_id", "view", "max_rows")
    return ScanToStore(**{name: line[name] for name in names})


def _copy_records(stores: Sequence[FeatureStore], merged: FeatureStore) -> None:
    """All that is known of the adapter's training and of keys; of weights, which are the same."""
    for store in stores:
        if store.adapter is not None:
            merged.record_adapter(**store.adapter)
    weights = next((store.weights for store in stores if store.weights is not None), None)
    if weights is not None and merged.weights is None:
        merged.record_weights(**weights)
    if keys := {key for store in stores for key in store.ids} - {*merged.ids}:
        merged.record_ids(keys | {*merged.ids})


def _results(shard: Shard, chosen: _Chosen) -> list[ScanResult]:
    """What extraction made of the scans of a shard, each read from its store and checked."""
    found = [chosen[scan.scan_id, scan.view] for scan in shard.scans]
    results = []
    for store in {id(one.store): one.store for one in found}.values():
        own = [one.line for one in found if one.store is store]
        results += store.results(pa.Table.from_pylist(own, schema=STORE_SCHEMA))
    return results
