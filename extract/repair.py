"""Repair: from what verification found, to a store that is whole again, to the byte.

What the rest of the store tells is written anew (`ctfm.store.repair`). Lost rows are extracted
again from just their scans: samples of nothing stand in for the other scans of the shard, so that
the batches are those of before, and what comes out has to have the digests of before. Where it has
not (another device, another batch size), the shards are taken back, and the next extraction redoes
them as a whole. Where a scan of a shard cannot be read any more, it is not taken back: the rest of
it is good.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ctfm.extract.options import Options
from ctfm.extract.packing import Embedder
from ctfm.extract.pipeline import Target, compute_threads, embedder_of
from ctfm.extract.readers import Prepared, read_ahead, read_jobs
from ctfm.extract.recorded import load_recorded
from ctfm.extract.remaining import good_but_unreadable
from ctfm.store.catalogue import read_catalogue
from ctfm.store.errors import BackboneError, ConfigError, StoreError, some
from ctfm.store.features import FeatureStore
from ctfm.store.places import place_of
from ctfm.store.plan import Shard
from ctfm.store.repair import rebuild_store
from ctfm.store.verify import VerifyReport


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where lost rows can be extracted from again."""

    scans: Path
    """The catalogue that the store was made from."""
    weights: Path | None = None
    adapter: Path | None = None
    template: Path | None = None
    trust_remote_code: bool = False
    download: bool = False
    """Whether weights may be fetched from where the store says that they are."""
    options: Options = field(default_factory=Options)
    """Device, batch size and readers; the first two as they were, for the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What a repair did."""

    rebuilt: tuple[str, ...] = ()
    """Files that were written anew from the rest of the store."""
    restored: tuple[str, ...] = ()
    """Scans that were extracted again, to the bytes of before."""
    shards: int = 0
    """Shards that are pending now: the next extraction redoes them."""
    left: tuple[str, ...] = ()
    """One sentence for each thing that could not be mended."""


def repair_store(store: Path | str, report: VerifyReport, source: Source) -> Repaired:
    """Mend a store; what cannot be mended stays as it is.

    Args:
        store: Folder or URL.
        report: What `verify_store` found.
        source: For the rows that are lost.

    Raises:
        StoreError: If the store is damaged beyond repair, or cannot be written.
    """
    rebuilt = rebuild_store(place_of(store), report)
    features, lost = FeatureStore.open(store), set(rebuilt.lost_scans)
    done = Repaired()
    if lost:
        try:
            done = _extract_again(features, lost, source)
        except (BackboneError, ConfigError, StoreError) as error:
            done = Repaired(left=(f"rows of {len(lost)} scans are lost: {error}",))
    return Repaired(
        rebuilt=rebuilt.files,
        restored=done.restored,
        shards=rebuilt.shards + done.shards,
        left=(*(f"{one.where}: {one.what}" for one in rebuilt.left), *done.left),
    )


def _extract_again(store: FeatureStore, lost: set[str], source: Source) -> Repaired:
    """Bring the rows of some scans back."""
    catalogue = read_catalogue(source.scans)
    recorded = load_recorded(
        store.settings,
        weights=source.weights,
        adapter=source.adapter,
        template=source.template,
        trust_remote_code=source.trust_remote_code,
        download=source.download,
    )
    config, options = recorded.config, source.options
    target = Target(backbone=recorded.backbone, config=config, store=store.path)
    embedder = embedder_of(target, options)
    shards = [shard for shard in store.shards() if not lost.isdisjoint(shard.scan_ids())]
    wanted = [scan_id for shard in shards for scan_id in shard.scan_ids() if scan_id in lost]
    jobs = list(read_jobs(catalogue, wanted).values())
    restored: list[str] = []
    others: list[str] = []
    left: list[str] = []
    with (
        compute_threads([target.backbone]),
        closing(
            read_ahead(jobs, config, workers=options.workers, template=recorded.template)
        ) as prepared,
    ):
        for shard in shards:
            _embed(shard, embedder, store=store, lost=lost, prepared=prepared)
            results = [one for one in embedder.finish_shard().results() if one.scan_id in lost]
            scan_ids = list(dict.fromkeys(result.scan_id for result in results))
            if store.write_again(shard, results):
                restored += scan_ids
            elif gone := [result for result in results if result.rows is None]:
                left.append(f"scan {gone[0].scan_id}: {gone[0].reason.value}, {gone[0].detail}")
            elif unreadable := [
                one
                for one in good_but_unreadable(_lines_of(store, shard), catalogue.files)
                if one not in lost
            ]:
                left.append(
                    f"scans {some(scan_ids)}: their rows came out otherwise (another device or "
                    "batch size?), and their shard cannot be done again as a whole, because files "
                    f"of {some(unreadable)} are gone or not in the catalogue"
                )
            else:
                others += scan_ids
    return Repaired(restored=tuple(restored), shards=store.take_back(others), left=tuple(left))


def _lines_of(store: FeatureStore, shard: Shard) -> pa.Table:
    return store.scans.filter(pc.equal(store.scans["shard"], shard.index))


def _embed(
    shard: Shard,
    embedder: Embedder,
    *,
    store: FeatureStore,
    lost: set[str],
    prepared: Iterator[Prepared],
) -> None:
    """The batches of a shard as they were, with blank samples but for the lost scans."""
    lines = _lines_of(store, shard)
    rows: dict[str, list[int]] = {}
    for line in lines.select(["scan_id", "n_rows"]).to_pylist():
        rows.setdefault(line["scan_id"], []).append(line["n_rows"])
    for scan_id, counts in rows.items():
        if scan_id in lost:
            embedder.add(scan_id, next(prepared))
        else:
            embedder.add_blank(scan_id, rows=counts)
