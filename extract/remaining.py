"""Remaining: from a store and a catalogue, to what an extraction has to do, and what it leaves.

A shard is done as a whole, so one scan that has to be done again takes the others of its shard with
it: only where these, whose rows are good, can be made again. A shard with scans that the catalogue
does not list is another extraction's.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from ctfm.extract.config import ExtractConfig
from ctfm.extract.options import Options
from ctfm.extract.sources import can_be_opened
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ConfigError
from ctfm.store.features import FeatureStore
from ctfm.store.plan import ScanToStore, Shard
from ctfm.store.pseudonyms import Pseudonyms
from ctfm.store.reasons import Reason


def scans_to_store(
    scans: Catalogue, config: ExtractConfig, *, unit: Literal["slice", "volume"]
) -> list[ScanToStore]:
    """The usable scans of a catalogue, once a view, as the plan of a store wants them.

    Raises:
        ConfigError: If no scan is usable.
    """
    columns = ("scan_id", "study_id", "patient_id", "usable")
    lines = scans.scans.select(columns).to_pylist()
    usable = [line for line in lines if line.pop("usable")]
    if not usable:
        raise ConfigError(
            f"none of the {len(lines)} scans of the catalogue is usable: its columns `reason` and "
            "`detail` say why"
        )
    # The most rows a scan can have is the grid's: coverage after a rotation is not known before.
    max_rows = 1 if unit == "volume" else config.max_slices
    return [
        ScanToStore(**line, view=view, max_rows=max_rows)
        for line in usable
        for view in range(config.views)
    ]


def shards_left(
    store: FeatureStore, scans: Catalogue, options: Options, *, redone: Collection[str] = ()
) -> list[Shard]:
    """The shards that are this call's to do: the pending ones.

    Args:
        store: Whose shards.
        scans: What is there to be extracted.
        options: Which of the shards are the task's.
        redone: `scans_to_redo` that were not taken back; their shards count as pending.
    """
    others = set() if options.write_off_unlisted else _shards_of_others(store, scans)
    pending, again = {shard.index for shard in store.pending_shards()}, set(redone)
    return [
        shard
        for shard in store.shards()
        if options.owns(shard.index)
        and shard.index not in others
        and (shard.index in pending or not again.isdisjoint(shard.scan_ids()))
    ]


def scans_of_others(store: FeatureStore, scans: Catalogue) -> list[str]:
    """Pending scans in shards with scans that a catalogue does not list: none of `shards_left`."""
    others = _shards_of_others(store, scans)
    left = [shard for shard in store.pending_shards() if shard.index in others]
    return [scan_id for shard in left for scan_id in shard.scan_ids()]


def stale_scans(store: FeatureStore, scans: Catalogue, options: Options) -> list[str]:
    """Scans of the task that were made from other files than a catalogue says they have now.

    Such as a series of which more slices have arrived since.
    """
    pseudonyms = Pseudonyms(scans.key)
    now = {scan_id: pseudonyms.files(digest) for scan_id, digest in scans.digests.items()}
    lines = store.scans.select(["scan_id", "source", "shard"]).to_pylist()
    stale = [
        line["scan_id"]
        for line in lines
        if options.owns(line["shard"])
        and line["source"]
        and now.get(line["scan_id"], line["source"]) != line["source"]
    ]
    return list(dict.fromkeys(stale))


def unused_scans(store: FeatureStore, scans: Catalogue) -> list[str]:
    """Scans with rows that a catalogue does not use, or does not list.

    Such as those of a study of which a better series has arrived since, which has rows, too.
    """
    used = scans.scans.filter(scans.scans["usable"])["scan_id"].combine_chunks()
    kept = store.scans.filter(pc.equal(store.scans["status"], "ok"))
    found = kept.filter(pc.invert(pc.is_in(kept["scan_id"], value_set=used)))["scan_id"]
    return list(dict.fromkeys(found.to_pylist()))


def _shards_of_others(store: FeatureStore, scans: Catalogue) -> set[int]:
    listed = scans.scans["scan_id"].combine_chunks()
    lines = store.scans
    unlisted = pc.invert(pc.is_in(lines["scan_id"], value_set=listed))
    return set(lines.filter(unlisted)["shard"].to_pylist())


def good_but_unreadable(lines: pa.Table, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Scans whose rows are good and could not be made again.

    Args:
        lines: Of a store.
        files: Of each scan, as the catalogue has them.
    """
    good = lines.filter(pc.equal(lines["status"], "ok"))["scan_id"].to_pylist()
    return [one for one in dict.fromkeys(good) if not can_be_opened(files.get(one, ()))]


def scans_to_redo(
    store: FeatureStore, scans: Catalogue, options: Options, *, retry_failed: bool
) -> list[str]:
    """Scans that are done again: stale ones; failed ones whose files are there again, or all.

    Only of the task's own shards, as other tasks may have redone theirs already; and only of shards
    that `shards_left` does and whose good rows can be made again, because a shard is redone as a
    whole.
    """
    files, stale = scans.files, set(stale_scans(store, scans, options))
    columns = ["scan_id", "status", "reason", "shard"]
    lines = store.scans.select(columns).to_pylist()
    own = [line for line in lines if options.owns(line["shard"])]
    asked = [
        line
        for line in own
        if (line["reason"] == Reason.VANISHED and can_be_opened(files.get(line["scan_id"], ())))
        or (retry_failed and line["status"] == "failed")
        or line["scan_id"] in stale
    ]
    shards = pa.array({line["shard"] for line in asked}, pa.int32())
    touched = store.scans.filter(pc.is_in(store.scans["shard"], value_set=shards))
    shard_of = {line["scan_id"]: line["shard"] for line in own}
    kept = {shard_of[one] for one in good_but_unreadable(touched, files)}
    if not options.write_off_unlisted:
        kept |= _shards_of_others(store, scans)
    return [line["scan_id"] for line in asked if line["shard"] not in kept]
