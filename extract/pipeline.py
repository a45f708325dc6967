"""Extraction: from a catalogue of scans to feature stores, in one pass over the scans.

    reader processes ──int16 HU──▶ device: windows, resize, normalise, backbone ──▶ writer thread

Several stores (backbones, adapters, window settings) are filled in one pass: what comes before the
device is done once a scan. The bytes of a shard depend on the plan, the settings and the batch size
alone, so an extraction that was killed and resumed gives the same bytes; but where the device ran
out of memory, and batches were halved at some point, last bits may differ. A scan that fails is a
line with a reason; nothing else is lost.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ctfm.extract.backbone import Backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.options import MOST_ON_A_CPU, Options
from ctfm.extract.packing import EmbeddedShard, Embedder
from ctfm.extract.readers import ReadJob, read_ahead, read_jobs
from ctfm.extract.remaining import scans_to_redo, scans_to_store, shards_left
from ctfm.extract.volume import Volume
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import BackboneError, ConfigError, ScanError
from ctfm.store.features import FeatureStore
from ctfm.store.plan import Shard
from ctfm.store.provenance import canonical_json
from ctfm.store.pseudonyms import Pseudonyms
from ctfm.store.reasons import Reason


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One store to fill: with which backbone, what decides its bytes, and where it goes."""

    backbone: Backbone
    """From `get_backbone(config.backbone, …)`."""

    config: ExtractConfig

    store: Path | str
    """A folder or a URL; made if absent."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Whom to tell how far an extraction is."""

    planned: Callable[[int], None] = lambda n_scans: None
    """Called once, with the number of scans to read."""

    done: Callable[[Reason], None] = lambda reason: None
    """Called once a scan that was read, with `Reason.OK` or why it cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What one call of `extract` did."""

    store: FeatureStore
    n_scans: int
    """Scans done by this call; those of an earlier call do not count."""
    seconds: float
    batch_size: int
    """Samples a forward pass at the end."""
    first_batch_size: int
    """At the start: larger if the device ran out of memory since."""


def extract(
    scans: Catalogue,
    store: Path | str,
    backbone: Backbone,
    *,
    config: ExtractConfig,
    options: Options | None = None,
    template: Volume | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Embed every usable scan of a catalogue, and write the embeddings to a feature store.

    `extract_all` with one target; see there.
    """
    target = Target(backbone=backbone, config=config, store=store)
    (done,) = extract_all(
        scans,
        [target],
        options=options,
        template=template,
        retry_failed=retry_failed,
        progress=progress,
    )
    return done


def extract_all(
    scans: Catalogue,
    targets: Sequence[Target],
    *,
    options: Options | None = None,
    template: Volume | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> list[Extraction]:
    """Embed every usable scan of a catalogue with several backbones, each into its own store.

    Run again after an interruption, it does what is left and gives the same bytes; so it does when
    a file that was gone is there again. Scans whose files are others than those that were embedded
    are done again. Run with a catalogue that has grown, it appends the new scans. Shards with scans
    of other catalogues are left alone. Targets that prepare scans alike share one reading of each
    scan.

    Args:
        scans: From `ctfm.extract.index.index` or `ctfm.store.catalogue.read_catalogue`.
        targets: What to compute and where to write it; one or more, no two to one store.
        options: Device, batches, processes; None is the defaults.
        template: The volume to register to, if `config.template` is set.
        retry_failed: Do the shards again in which a scan failed; those of the task.
        progress: Whom to tell; None is nobody.

    Returns:
        What was done, one a target.

    Raises:
        StoreError: If a store exists and was made with other settings (the message names them),
            or cannot be written.
        ConfigError: If `template` and `config.template` do not go together.
        BackboneError: If a single slice does not fit into the memory of the device.
    """
    options, progress = options or Options(), progress or Progress()
    start_s = time.monotonic()
    check_targets(targets, template)
    jobs = [
        Job(
            target=target,
            store=create_store(scans, target, options=options, retry_failed=retry_failed),
            embedder=embedder_of(target, options),
        )
        for target in targets
    ]
    first_sizes = [job.embedder.batch_size for job in jobs]
    shards = [shards_left(job.store, scans, options) for job in jobs]
    passes = passes_of(targets, shards)
    progress.planned(sum(len(one.scan_ids) for one in passes))
    for one in passes:
        members = [jobs[i] for i in one.targets]
        reads = read_jobs(scans, one.scan_ids)
        run_pass(one, members, reads, options=options, template=template, progress=progress)
    for job in jobs:
        job.store.finish()
    return [
        Extraction(
            store=job.store,
            n_scans=sum(len(shard.scan_ids()) for shard in own),
            seconds=time.monotonic() - start_s,
            batch_size=job.embedder.batch_size,
            first_batch_size=first,
        )
        for job, own, first in zip(jobs, shards, first_sizes, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A target whose store is open and whose backbone is on the device."""

    target: Target
    store: FeatureStore
    embedder: Embedder


def create_store(
    scans: Catalogue, target: Target, *, options: Options, retry_failed: bool = False
) -> FeatureStore:
    """Make or extend the store of a target, with the plan of every usable scan.

    Shards are taken back in which a scan failed because a file of it was gone, and is there again,
    or in which a scan was made from other files than it has now; as long as the others of the
    shard, whose rows are good, can be read again.
    """
    config = target.config
    store = FeatureStore.create(
        target.store,
        settings=store_settings(config, target.backbone),
        tokens={token: target.backbone.tokens[token] for token in config.tokens},
        dtype=config.dtype,
        scans=scans_to_store(scans, config, unit=target.backbone.entry.unit),
        shard_scans=options.shard_scans,
        compress=options.compress,
        ids=Pseudonyms(scans.key).fingerprint,
    )
    backbone = target.backbone
    hub_id = None if backbone.commit is None else backbone.entry.hub_id
    if hub_id is not None or backbone.remarks:
        store.record_weights(hub_id=hub_id, commit=backbone.commit, remarks=backbone.remarks)
    if (adapter := backbone.adapter) is not None:
        store.record_adapter(
            max_relative_error=adapter.max_relative_error,
            scan_ids=adapter.scan_ids,
            patient_ids=adapter.patient_ids,
        )
    store.take_back(scans_to_redo(store, scans, options, retry_failed=retry_failed))
    return store


def embedder_of(target: Target, options: Options) -> Embedder:
    """The backbone of a target on the device, in its precision, with its batch size."""
    backbone = target.backbone.to(options.device, target.config.precision)
    usual = backbone.entry.batch_size
    if options.device == "cpu":
        usual = min(usual, MOST_ON_A_CPU)
    batch_size = options.batch_size or usual
    return Embedder(backbone, target.config, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One reading of some scans, which serves several targets."""

    targets: Sequence[int]
    """Which, by their place in the list of targets."""
    shards: Sequence[Sequence[Shard]]
    """Left to do, of each of these; in step: the i-th of every target holds the same scans."""

    @property
    def scan_ids(self) -> list[str]:
        """The scans to read, in order."""
        return [scan_id for shard in self.shards[0] for scan_id in shard.scan_ids()]


def passes_of(targets: Sequence[Target], shards: Sequence[Sequence[Shard]]) -> list[Pass]:
    """The fewest readings for the shards that are left to do of each target.

    Targets that prepare scans alike share the reading of the shards that hold the same scans; what
    one of them has done already is read for the others alone.
    """
    sharing: dict[Any, dict[int, Shard]] = {}
    for i, (target, left) in enumerate(zip(targets, shards, strict=True)):
        for shard in left:
            key = (target.config.preparation(), tuple(shard.scan_ids()))
            sharing.setdefault(key, {})[i] = shard
    together: dict[tuple[int, ...], list[dict[int, Shard]]] = {}
    for members in sharing.values():
        together.setdefault(tuple(members), []).append(members)
    return [
        Pass(targets=numbers, shards=[[members[i] for members in one] for i in numbers])
        for numbers, one in together.items()
    ]


def run_pass(
    one: Pass,
    jobs: Sequence[Job],
    reads: Mapping[str, ReadJob],
    *,
    options: Options,
    template: Volume | None,
    progress: Progress,
) -> None:
    """Read the scans of a pass once; write and commit every shard of its targets.

    Args:
        one: What to do.
        jobs: Of the targets of the pass, in its order.
        reads: Of each scan, from `read_jobs`.
        options: Processes that read.
        template: The volume that the `template` of the configs is the digest of.
        progress: Whom to tell of every scan.
    """
    config = jobs[0].target.config
    queue = [reads[scan_id] for scan_id in one.scan_ids]
    with (
        compute_threads([job.target.backbone for job in jobs]),
        closing(read_ahead(queue, config, workers=options.workers, template=template)) as prepared,
        _Writer(waiting=len(jobs)) as writer,
    ):
        for shards in zip(*one.shards, strict=True):
            scan_ids = shards[0].scan_ids()
            for scan_id, scan in zip(scan_ids, islice(prepared, len(scan_ids)), strict=True):
                for job in jobs:
                    job.embedder.add(scan_id, scan)
                progress.done(scan.reason if isinstance(scan, ScanError) else Reason.OK)
            sources = {scan_id: reads[scan_id].source for scan_id in scan_ids}
            for job, shard in zip(jobs, shards, strict=True):
                embedded = job.embedder.finish_shard()
                writer.write(partial(_write, job.store, shard, embedded, sources=sources))


@contextmanager
def compute_threads(backbones: Sequence[Backbone]) -> Iterator[None]:
    """Compute with one thread if no backbone has weights: small operations are slower with more."""
    before = torch.get_num_threads()
    if all(backbone.entry.parameters == 0 for backbone in backbones):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def store_settings(config: ExtractConfig, backbone: Backbone) -> dict[str, Any]:
    """Everything that decides what a row of the store means; its digest is the fingerprint."""
    own = {f"backbone_{name}": value for name, value in backbone.settings().items()}
    return {**config.as_dict(), **own}


def check_same_backbone(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Refuse a backbone that would make other rows than those of a store.

    Args:
        wanted: Settings of the store.
        got: `store_settings` of what is loaded.

    Raises:
        BackboneError: Naming each setting that differs.
    """
    # As JSON holds them: tuples are lists, and 0.0 is 0. What is None was left out.
    wanted, got = (json.loads(canonical_json(settings)) for settings in (wanted, got))
    differing = [
        f"{name} is {got.get(name)!r}, of the store {wanted.get(name)!r}"
        for name in sorted(wanted.keys() | got.keys())
        if got.get(name) != wanted.get(name)
    ]
    if differing:
        raise BackboneError(
            f"the backbone is not the one of the store: {'; '.join(differing)}. "
            "Pass the same weights with --weights, and the same LoRA adapter with --adapter"
        )


def check_targets(targets: Sequence[Target], template: Volume | None) -> None:
    """Refuse targets that cannot be filled together, or lack their template.

    Raises:
        ConfigError: Saying which.
    """
    for target in targets:
        if (template is None) != (target.config.template is None):
            raise ConfigError(
                "config.template must be the digest of `template`, and None without one"
            )
    stores = [str(target.store) for target in targets]
    if len(set(stores)) < len(stores):
        raise ConfigError(
            f"each backbone needs a store of its own, got {', '.join(stores)}: extract one at a "
            "time with --out, or give adapters folders of different names"
        )


class _Writer:
    """Writes shards in a thread while the next ones are computed."""

    def __init__(self, *, waiting: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ctfm-writer")
        self._waiting: deque[Future[None]] = deque()
        self._limit = waiting

    def __enter__(self) -> "_Writer":
        return self

    def write(self, shard: Callable[[], None]) -> None:
        """Write a shard soon; raise now what went wrong with one of those before it."""
        self._wait(self._limit - 1)
        self._waiting.append(self._thread.submit(shard))

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if failed is None:
            self._wait(0)

    def _wait(self, limit: int) -> None:
        while len(self._waiting) > limit:
            self._waiting.popleft().result()


def _write(
    store: FeatureStore, shard: Shard, embedded: EmbeddedShard, *, sources: Mapping[str, str]
) -> None:
    results = [replace(one, source=sources[one.scan_id]) for one in embedded.results()]
    store.write_shard(shard, results)
