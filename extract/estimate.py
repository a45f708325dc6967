"""A dry run: from a catalogue and a target, to what an extraction will take. Writes nothing.

A few scans are read and embedded on this machine, and timed; the rest is arithmetic. The time is a
forecast from a probe of seconds, not a promise. It is of everything that is left, by one process on
one device: the tasks of an array, or the workers of a cluster, divide it among them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ctfm.extract.options import Options
from ctfm.extract.pipeline import Target, compute_threads, embedder_of, store_settings
from ctfm.extract.readers import Prepared, prepare_or_reason, read_jobs
from ctfm.extract.remaining import scans_to_redo, scans_to_store, shards_left
from ctfm.extract.volume import Volume
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ScanError
from ctfm.store.features import FeatureStore
from ctfm.store.plan import ScanToStore
from ctfm.store.provenance import usable_cores

PROBE_SCANS = 3
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_POSITION_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is left to do for one target, and what it will take."""

    scans: int
    """Scans that the store does not have yet, or would be done again."""
    rows: int
    """Rows they can have at most, views included."""
    disk_bytes: int
    """Of those rows, uncompressed."""
    read_s: float
    """CPU seconds to read and prepare one scan."""
    embed_s: float
    """Seconds of the device for one scan."""
    seconds: float
    """Until it is done by one process, with the device, batches and readers that were given."""
    tried: int
    """Scans of the probe."""
    failed: Sequence[ScanError]
    """Why some of them could not be used; if all, there is no forecast: `seconds` is NaN."""


def estimate(
    scans: Catalogue,
    target: Target,
    *,
    options: Options,
    template: Volume | None = None,
    retry_failed: bool = False,
) -> Estimate:
    """Forecast an extraction into one store.

    Args:
        scans: The catalogue.
        target: What would be computed, and where it would go; the store is not made.
        options: As the extraction would get them; of a task, the forecast is for all tasks.
        template: The volume that `config.template` is the digest of.
        retry_failed: As the extraction would get it.

    Raises:
        ConfigError: If no scan is usable.
        StoreError: If there is a store that cannot be opened, or has other settings.
    """
    config, backbone = target.config, target.backbone
    left = _left(scans, target, replace(options, task=(0, 1)), retry_failed=retry_failed)
    scan_ids = list(dict.fromkeys(scan.scan_id for scan in left))
    rows = sum(scan.max_rows for scan in left)
    row_bytes = sum(backbone.tokens[token] * _ITEM_BYTES[config.dtype] for token in config.tokens)
    jobs = read_jobs(scans, scan_ids[:PROBE_SCANS]).values()
    start_s = time.process_time()
    prepared = [prepare_or_reason(job, config, template) for job in jobs]
    read_s = (time.process_time() - start_s) / max(1, len(jobs))
    with compute_threads([backbone]):
        embed_s = _embed_s(target, prepared, options)
    failed = [scan for scan in prepared if isinstance(scan, ScanError)]
    none_usable = len(failed) == len(prepared) > 0
    return Estimate(
        scans=len(scan_ids),
        rows=rows,
        disk_bytes=rows * (row_bytes + _POSITION_BYTES),
        read_s=read_s,
        embed_s=embed_s,
        seconds=math.nan if none_usable else len(scan_ids) * _scan_s(read_s, embed_s, options),
        tried=len(prepared),
        failed=failed,
    )


def _left(
    scans: Catalogue, target: Target, options: Options, *, retry_failed: bool
) -> list[ScanToStore]:
    """What an extraction would do: what the store lacks, and all of a shard that is done again."""
    config, backbone = target.config, target.backbone
    planned = scans_to_store(scans, config, unit=backbone.entry.unit)
    if not FeatureStore.exists(target.store):
        return planned
    store = FeatureStore.open(target.store)
    store.refuse_other(
        settings=store_settings(config, backbone),
        tokens={token: backbone.tokens[token] for token in config.tokens},
        dtype=config.dtype,
    )
    stored = set(store.scans["scan_id"].to_pylist())
    redone = scans_to_redo(store, scans, options, retry_failed=retry_failed)
    shards = shards_left(store, scans, options, redone=redone)
    return [
        *(scan for shard in shards for scan in shard.scans),
        *(scan for scan in planned if scan.scan_id not in stored),
    ]


def _embed_s(target: Target, prepared: Sequence[Prepared], options: Options) -> float:
    """Seconds a scan through the backbone, after one that warms it up."""
    usable = [scan for scan in prepared if not isinstance(scan, ScanError)]
    if not usable:
        return 0.0
    embedder = embedder_of(target, options)
    embedder.add("", usable[0])
    embedder.finish_shard().results()
    start_s = time.perf_counter()
    for scan in usable:
        embedder.add("", scan)
    embedder.finish_shard().results()
    return (time.perf_counter() - start_s) / len(usable)


def _scan_s(read_s: float, embed_s: float, options: Options) -> float:
    if options.device == "cpu":  # readers and backbone share the cores
        return embed_s + read_s / usable_cores()
    return max(embed_s, read_s / max(1, options.workers))
