"""Extraction on many devices: the shards of an extraction, as tasks of a Dask cluster.

The client makes the stores and the plan; each task reads, embeds and commits a run of shards on
one worker, which loads the backbones once and keeps them. A task whose worker dies is run again by
Dask, elsewhere, and does only the shards that are not committed. Which worker does a shard changes
no byte of it. There is no scheduler of our own.

Scans and stores must be reachable under the same paths from every machine.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ctfm.extract.readers import ReadJob, read_jobs
from ctfm.extract.reading import read_template
from ctfm.extract.remaining import shards_left
from ctfm.extract.targets import TargetSpec
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ClusterError, ConfigError
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
    reads: Mapping[str, ReadJob]
    options: Options
    template: Path | None


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
        ClusterError: If the workers of a task died more often than the scheduler's setting
            `distributed.scheduler.allowed-failures` allows: 3 times, unless it says otherwise.
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
    _run_all(parts, client, progress)
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
            reads=read_jobs(scans, scan_ids),
            options=options,
            template=template,
        )


def _count_workers(client: "Client") -> int:
    """Those that are there, or that were asked for and still wait in a queue."""
    return max(1, len(client.nthreads()), len(getattr(client.cluster, "plan", ())))


def _run_all(parts: Sequence[Part], client: "Client", progress: Progress) -> None:
    from distributed import KilledWorker, as_completed

    futures = [client.submit(run_part, part, pure=False) for part in parts]
    try:
        for _, reasons in as_completed(futures, with_results=True):
            for reason in reasons:
                progress.done(reason)
    except KilledWorker as error:
        raise ClusterError(
            f"the workers that ran a task died again and again ({error.last_worker}): look at "
            "their logs; too little memory for the backbone or for the reader processes is the "
            "usual cause"
        ) from error
    finally:
        client.cancel(futures)


def run_part(part: Part) -> list[Reason]:
    """Do the shards of a part that are not committed yet; runs on a worker.

    Returns:
        Of every scan that was read, `Reason.OK` or why it cannot be used.
    """
    reasons: list[Reason] = []
    options = replace(part.options, device=_own_device(part.options.device))
    template, digest = (None, None) if part.template is None else read_template(part.template)
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
