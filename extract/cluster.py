"""Extraction on many devices: the shards of an extraction, as tasks of a Dask cluster.

The client makes the stores and the plan; each task reads, embeds and commits a run of shards on
one worker, which loads the backbones once and keeps them. A task whose worker dies is run again by
Dask, elsewhere, and does only the shards that are not committed. Which worker does a shard changes
no byte of it. There is no scheduler of our own.

A task whose workers die again and again is split until the scan is known that kills them: to its
shards, read in processes of their own; then to its scans, one at a time. That scan is
`reader_crashed`, as where readers are local, and everything else goes on.

Scans and stores must be reachable under the same paths from every machine.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ctfm.extract.options import Options
from ctfm.extract.pipeline import (
    Job,
    Pass,
    Progress,
    Target,
    check_same_backbone,
    check_targets,
    create_store,
    embedder_of,
    passes_of,
    run_pass,
    store_settings,
)
from ctfm.extract.readers import ReadJob, read_ahead, read_jobs
from ctfm.extract.reading import read_template
from ctfm.extract.remaining import shards_left
from ctfm.extract.targets import TargetSpec
from ctfm.extract.volume import Volume
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ClusterError, ConfigError, some
from ctfm.store.extras import optional
from ctfm.store.features import FeatureStore
from ctfm.store.isolation import isolate_children
from ctfm.store.reasons import Reason

if TYPE_CHECKING:
    from distributed import Client

ClusterKind = Literal["local", "local-cuda", "slurm"]

SHARDS_A_TASK = 4
"""Fewer where workers would be left without one. A task starts reader processes, and its last scans
are not read ahead. A task that is lost costs only the shard it was at."""

CONNECT_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one task does: the same scans for some targets."""

    specs: tuple[TargetSpec, ...]
    shards: tuple[tuple[int, ...], ...]
    """Numbers of the shards in the store of each."""
    scan_ids: tuple[tuple[str, ...], ...]
    """Of each of these shards, which hold the same scans in every store."""
    reads: Mapping[str, ReadJob]
    options: Options
    template: Path | None

    def by_shard(self) -> "list[Part]":
        """A part for each shard, whose scans are read in processes of their own."""
        options = replace(self.options, workers=max(1, self.options.workers))
        return [
            replace(
                self,
                shards=tuple((own[i],) for own in self.shards),
                scan_ids=(ids,),
                reads={scan_id: self.reads[scan_id] for scan_id in ids},
                options=options,
            )
            for i, ids in enumerate(self.scan_ids)
        ]

    def without(self, scan_ids: Collection[str]) -> "Part":
        """The part with some scans given up: they are not read."""
        given_up = {one: replace(self.reads[one], given_up=True) for one in scan_ids}
        return replace(self, reads={**self.reads, **given_up})


def extract_on_cluster(
    scans: Catalogue,
    specs: Sequence[TargetSpec],
    *,
    client: "Client",
    options: Options | None = None,
    template: Path | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> list[FeatureStore]:
    """As `ctfm.extract.pipeline.extract_all`, on the workers of a Dask cluster.

    Args:
        scans: The catalogue; its paths must be valid on every worker.
        specs: What to compute and where to write it.
        client: Of a cluster whose workers have one thread each, and one device each.
        options: As for `extract_all`; `device` "auto" is the GPU that a worker sees, else its CPU.
        template: The file of the volume to register to.
        retry_failed: Do the shards again in which a scan failed.
        progress: Told after every finished task.

    Returns:
        The stores, complete but for scans of other catalogues.

    Raises:
        StoreError: If a store was made with other settings, or cannot be written.
        ConfigError: If the targets do not go together, or the template is missing.
        ClusterError: If workers die whatever the scan, more often than the scheduler's setting
            `distributed.scheduler.allowed-failures` allows: 3 times, unless it says otherwise.
            What the others could do is in the stores.
    """
    options, progress = options or Options(device="auto"), progress or Progress()
    specs = [spec.absolute() for spec in specs]  # a worker may have been started in another folder
    template = None if template is None else template.absolute()
    targets = [spec.load() for spec in specs]
    check_targets(targets, None if template is None else read_template(template)[0])
    stores = [
        create_store(scans, target, options=options, retry_failed=retry_failed)
        for target in targets
    ]
    passes = passes_of(targets, [shards_left(store, scans, options) for store in stores])
    progress.planned(sum(len(one.scan_ids) for one in passes))
    n_workers = _count_workers(client)
    parts = [
        part
        for one in passes
        for part in _parts(
            one, specs, scans, options=options, template=template, n_workers=n_workers
        )
    ]
    try:
        _run_all(parts, client, progress)
    finally:  # what was done is told, whatever the rest
        for store in stores:
            store.finish()
    return stores


def _parts(
    one: Pass,
    specs: Sequence[TargetSpec],
    scans: Catalogue,
    *,
    options: Options,
    template: Path | None,
    n_workers: int,
) -> Iterator[Part]:
    at_once = max(1, min(SHARDS_A_TASK, len(one.shards[0]) // (2 * n_workers)))
    for start in range(0, len(one.shards[0]), at_once):
        shards = [left[start : start + at_once] for left in one.shards]
        scan_ids = [scan_id for shard in shards[0] for scan_id in shard.scan_ids()]
        yield Part(
            specs=tuple(specs[i] for i in one.targets),
            shards=tuple(tuple(shard.index for shard in left) for left in shards),
            scan_ids=tuple(tuple(shard.scan_ids()) for shard in shards[0]),
            reads=read_jobs(scans, scan_ids),
            options=options,
            template=template,
        )


def _count_workers(client: "Client") -> int:
    """Those that are there, or that were asked for and still wait in a queue."""
    return max(1, len(client.nthreads()), len(getattr(client.cluster, "plan", ())))


def _run_all(parts: Sequence[Part], client: "Client", progress: Progress) -> None:
    died = _run(parts, client, progress)
    # Whoever waited at a worker that another scan killed is blamed, too: hence alone, in the end.
    died = _run([shard for part in died for shard in part.by_shard()], client, progress)
    if died and _kills(died[0], (), client):
        raise ClusterError(
            "the workers die before they read a scan: look at their logs; too little memory for "
            "the backbone is the usual cause"
        )
    for shard in died:
        killers = [one for one in shard.scan_ids[0] if _kills(shard, (one,), client)]
        alone = len(shard.scan_ids[0]) == 1
        if (len(killers) == len(shard.scan_ids[0]) and not alone) or _run(
            [shard.without(killers)], client, progress
        ):
            raise ClusterError(
                f"the workers that did a shard died again and again, whatever the scan (it holds "
                f"{some(shard.scan_ids[0])}): look at their logs; too little memory for the "
                "backbone or for the reader processes is the usual cause"
            )


def _run(parts: Sequence[Part], client: "Client", progress: Progress) -> list[Part]:
    """Do parts, and give back those whose workers died."""
    from distributed import KilledWorker, as_completed

    futures = [client.submit(run_part, part, pure=False) for part in parts]
    parts_of = {future.key: part for future, part in zip(futures, parts, strict=True)}
    died = []
    try:
        for future in as_completed(futures):
            try:
                reasons = future.result()
            except KilledWorker:
                died.append(parts_of[future.key])
                continue
            for reason in reasons:
                progress.done(reason)
    finally:
        client.cancel(futures)
    return died


def _kills(part: Part, scan_ids: Sequence[str], client: "Client") -> bool:
    """Whether some scans of a part kill the worker that has nothing else to do."""
    from distributed import KilledWorker

    try:
        client.submit(try_scans, part, scan_ids, pure=False).result()
    except KilledWorker:
        return True
    return False


def run_part(part: Part) -> list[Reason]:
    """Do the shards of a part that are not committed yet; runs on a worker.

    Returns:
        Of every scan that was read, `Reason.OK` or why it cannot be used.
    """
    reasons: list[Reason] = []
    options, template, digest = _on_this_worker(part)
    with _ONE_AT_A_TIME:
        targets = [_resident(spec, options.device) for spec in part.specs]
        stores = [FeatureStore.open(spec.store) for spec in part.specs]
        for target, store in zip(targets, stores, strict=True):
            # What lies under the same path on this machine may be something else.
            config = replace(target.config, template=digest)
            check_same_backbone(store.settings, store_settings(config, target.backbone))
        left = [
            [shard for shard in store.pending_shards() if shard.index in own]
            for store, own in zip(stores, part.shards, strict=True)
        ]
        for one in passes_of(targets, left):
            jobs = [
                Job(target=targets[i], store=stores[i], embedder=embedder_of(targets[i], options))
                for i in one.targets
            ]
            run_pass(
                one,
                jobs,
                part.reads,
                options=options,
                template=template,
                progress=Progress(done=reasons.append),
            )
    return reasons


def try_scans(part: Part, scan_ids: Sequence[str]) -> None:
    """Read and embed scans of a part, and write nothing; runs on a worker, which it may kill."""
    options, template, _ = _on_this_worker(part)
    with _ONE_AT_A_TIME:
        targets = [_resident(spec, options.device) for spec in part.specs]
        embedders = [embedder_of(target, options) for target in targets]
        queue = [part.reads[scan_id] for scan_id in scan_ids]
        config = targets[0].config
        with closing(
            read_ahead(queue, config, workers=options.workers, template=template)
        ) as prepared:
            for scan_id, scan in zip(scan_ids, prepared, strict=True):
                for embedder in embedders:
                    embedder.add(scan_id, scan)
        for embedder in embedders:
            embedder.finish_shard().results()


def _on_this_worker(part: Part) -> tuple[Options, Volume | None, str | None]:
    """Options with the device of this worker; the template and its digest."""
    options = replace(part.options, device=_own_device(part.options.device))
    return options, *((None, None) if part.template is None else read_template(part.template))


_ONE_AT_A_TIME = threading.Lock()
"""A worker has one device, whatever its number of threads."""


@lru_cache(maxsize=8)
def _resident(spec: TargetSpec, device: str) -> Target:
    """The target with its backbone on the device of this worker, loaded once."""
    target = spec.load()
    return replace(target, backbone=target.backbone.to(device, spec.config.precision))


def _own_device(asked: str) -> str:
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def connect(
    *, scheduler: str | None = None, cluster: str | None = None, workers: int = 1
) -> "Iterator[Client]":
    """A client of a cluster that runs, or of one that is started here and ended with the block.

    Args:
        scheduler: Address of a scheduler, such as `tcp://host:8786`, or a scheduler file.
        cluster: What to start instead: `local`, processes of this machine; `local-cuda`, one a
            GPU of it; `slurm`, jobs as the Dask configuration under `jobqueue.slurm` says.
        workers: Processes or jobs to start; a GPU each for `local-cuda`, which ignores it.

    Raises:
        ConfigError: If the scheduler is not to be reached, or a package is missing.
    """
    from distributed import Client

    if scheduler is not None:
        try:
            client = _file_or_address(scheduler)
        except (OSError, TimeoutError) as error:
            raise ConfigError(
                f"no scheduler answers at {scheduler}: is `dask scheduler` running, and is the "
                "address as it printed it?"
            ) from error
        with client:
            yield client
        return
    with _start(cluster or "local", workers) as started, Client(started) as client:
        yield client


def _file_or_address(scheduler: str) -> "Client":
    from distributed import Client

    if Path(scheduler).is_file():
        return Client(scheduler_file=scheduler, timeout=CONNECT_TIMEOUT_S)
    return Client(scheduler, timeout=CONNECT_TIMEOUT_S)


def _start(kind: str, workers: int) -> Any:
    isolate_children()
    if kind not in get_args(ClusterKind):
        raise ConfigError(f"cluster must be {', '.join(get_args(ClusterKind))}, got {kind!r}")
    if kind == "local":
        from distributed import LocalCluster

        return LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, memory_limit=0
        )
    if kind == "local-cuda":
        dask_cuda = optional("dask_cuda", extra="cuda-cluster", what="a cluster of GPUs")
        return dask_cuda.LocalCUDACluster(threads_per_worker=1)
    jobqueue = optional("dask_jobqueue", extra="slurm", what="a cluster of SLURM jobs")
    try:
        cluster = jobqueue.SLURMCluster()
    except ValueError as error:
        raise ConfigError(
            "dask-jobqueue was not told how large a job is: set `cores: 1` and `memory` (and the "
            "partition and GPU) under `jobqueue: slurm:` in ~/.config/dask/jobqueue.yaml"
        ) from error
    cluster.scale(jobs=workers)
    return cluster
