"""Extraction: from a catalogue of scans to a feature store.

    reader processes ──int16 HU──▶ device: windows, resize, normalise, backbone ──▶ writer thread

Slices of the scans of a shard are packed into full batches; batches never span shards, so the
bytes of a shard depend on the plan and the settings alone, and an extraction that was killed and
resumed gives the same bytes. A scan that fails is a line with a reason; nothing else is lost.

Axes: s slices, m channels, y rows, x columns, d embedding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ctfm.extract.backbone import Backbone
from ctfm.extract.config import ExtractConfig
from ctfm.extract.prepare import PreparedScan
from ctfm.extract.readers import Prepared, ReadJob, read_ahead
from ctfm.extract.volume import Volume
from ctfm.store.catalogue import Catalogue
from ctfm.store.errors import ConfigError, ScanError
from ctfm.store.features import FeatureStore, ScanResult
from ctfm.store.plan import SHARD_SCANS, ScanToStore, Shard
from ctfm.store.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What one call of `extract` did."""

    store: FeatureStore
    n_scans: int
    """Scans done by this call; those of an earlier call do not count."""
    seconds: float


def extract(
    scans: Catalogue,
    store: Path,
    backbone: Backbone,
    *,
    config: ExtractConfig,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 1,
    template: Volume | None = None,
    shard_scans: int = SHARD_SCANS,
    compress: bool = False,
    retry_failed: bool = False,
    planned: Callable[[int], None] = lambda n_scans: None,
    progress: Callable[[Reason], None] = lambda reason: None,
) -> Extraction:
    """Embed every usable scan of a catalogue, and write the embeddings to a feature store.

    Run again after an interruption, it does what is left and gives the same bytes. Run with a
    catalogue that has grown, it appends the new scans.

    Args:
        scans: From `ctfm.extract.index.index` or `ctfm.store.catalogue.read_catalogue`.
        store: Folder of the store; made if absent.
        backbone: From `get_backbone(config.backbone, …)`.
        config: Decides the bytes.
        device: A torch device.
        batch_size: Slices a forward pass. Another size may round the last bit differently.
        workers: Reader processes; 0 reads in this one.
        template: The volume to register to, if `config.template` is set.
        shard_scans: Scans of a shard: what a kill can cost. Only for scans new to the store.
        compress: zstd; only of effect when the store is made.
        retry_failed: Do the shards again in which a scan failed.
        planned: Called once with the number of scans to do.
        progress: Called once a scan, with `Reason.OK` or why it cannot be used.

    Raises:
        StoreError: If the store exists and was made with other settings (the message names them),
            or cannot be written.
        ConfigError: If `template` and `config.template` do not go together.
    """
    if (template is None) != (config.template is None):
        raise ConfigError("config.template must be the digest of `template`, and None without one")
    start_s = time.monotonic()
    features = FeatureStore.create(
        store,
        settings=store_settings(config, backbone),
        tokens={token: backbone.tokens[token] for token in config.tokens},
        dtype=config.dtype,
        scans=scans_to_store(scans, config),
        shard_scans=shard_scans,
        compress=compress,
    )
    if retry_failed:
        features.retry_failed()
    shards = features.pending_shards()
    jobs = [ReadJob(i, tuple(scans.files[i])) for shard in shards for i in _scan_ids(shard)]
    planned(len(jobs))
    embedder = _Embedder(backbone.to(device, config.precision), config, batch_size)
    with (
        _threads(1 if backbone.entry.parameters == 0 else torch.get_num_threads()),
        closing(read_ahead(jobs, config, workers=workers, template=template)) as prepared,
        _Writer(features) as writer,
    ):
        for shard in shards:
            writer.write(shard, embedder.embed(_scan_ids(shard), _told(prepared, progress)))
    features.finish()
    return Extraction(store=features, n_scans=len(jobs), seconds=time.monotonic() - start_s)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this many threads: many small operations are slower with more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def store_settings(config: ExtractConfig, backbone: Backbone) -> dict[str, Any]:
    """Everything that decides what a row of the store means; its digest is the fingerprint."""
    own = {f"backbone_{name}": value for name, value in backbone.settings().items()}
    return {**config.as_dict(), **own}


def scans_to_store(scans: Catalogue, config: ExtractConfig) -> list[ScanToStore]:
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
    return [
        ScanToStore(**line, view=view, max_rows=config.max_slices)
        for line in usable
        for view in range(config.views)
    ]


def _scan_ids(shard: Shard) -> list[str]:
    return list(dict.fromkeys(scan.scan_id for scan in shard.scans))  # once, whatever the views


def _told(prepared: Iterator[Prepared], progress: Callable[[Reason], None]) -> Iterator[Prepared]:
    for result in prepared:
        progress(result.reason if isinstance(result, ScanError) else Reason.OK)
        yield result


class _Writer:
    """Writes one shard in a thread while the next one is computed."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ctfm-writer")
        self._last: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def write(self, shard: Shard, results: Sequence[ScanResult]) -> None:
        """Wait for the shard before, and raise what went wrong with it; then start this one."""
        self._wait()
        self._last = self._thread.submit(self._store.write_shard, shard, results)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if failed is None:
            self._wait()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


Outcome = tuple[str, int, Float32[np.ndarray, "..."] | ScanError]
"""Scan, view, and the positions of its slices, or why it has none."""


class _Embedder:
    """Runs the backbone over the packed slices of a shard."""

    def __init__(self, backbone: Backbone, config: ExtractConfig, batch_size: int) -> None:
        self._backbone = backbone
        self._config = config
        self._batch_size = batch_size

    def embed(self, scan_ids: Sequence[str], prepared: Iterator[Prepared]) -> list[ScanResult]:
        """Embed the next `len(scan_ids)` scans of `prepared`: one result a scan and view."""
        outcomes: list[Outcome] = []
        batches = _Batches(self._forward, self._batch_size)
        for scan_id, result in zip(scan_ids, islice(prepared, len(scan_ids)), strict=True):
            for view in range(self._config.views):
                if isinstance(result, ScanError):
                    outcomes.append((scan_id, view, result))
                else:
                    outcomes.append((scan_id, view, result[view].position_mm))
                    batches.add(self._channels(result[view]))
        return list(self._results(outcomes, batches.finish()))

    def _channels(self, scan: PreparedScan) -> Float[Tensor, "s m y x"]:
        hu = torch.from_numpy(scan.hu)
        return self._backbone.channels(hu, self._config.windows_hu, scan.jitter)

    def _forward(self, channels: Float[Tensor, "s m y x"]) -> list[Float[Tensor, "s _"]]:
        tokens = self._backbone.embed(channels)
        return [tokens[token] for token in self._config.tokens]

    def _results(
        self,
        outcomes: Sequence[Outcome],
        rows: Sequence[Float32[np.ndarray, "s _"]],
    ) -> Iterator[ScanResult]:
        start = 0
        for scan_id, view, outcome in outcomes:
            if isinstance(outcome, ScanError):
                yield _failure(scan_id, view, outcome)
                continue
            stop = start + len(outcome)
            own = {
                token: all_rows[start:stop]
                for token, all_rows in zip(self._config.tokens, rows, strict=True)
            }
            if all(np.isfinite(values).all() for values in own.values()):
                yield ScanResult(scan_id=scan_id, view=view, rows=own, position_mm=outcome)
            else:
                detail = "the backbone returned NaN or infinity"
                error = ScanError(Reason.NOT_FINITE_EMBEDDING, detail)
                yield _failure(scan_id, view, error)
            start = stop


def _failure(scan_id: str, view: int, error: ScanError) -> ScanResult:
    return ScanResult(
        scan_id=scan_id, view=view, rows=None, reason=error.reason, detail=error.detail
    )


class _Batches:
    """Packs slices into batches of one size; only the last of a shard is smaller."""

    def __init__(
        self, forward: Callable[[Tensor], list[Float[Tensor, "s _"]]], batch_size: int
    ) -> None:
        self._forward = forward
        self._size = batch_size
        self._waiting: list[Tensor] = []
        self._outputs: list[list[Tensor]] = []

    def add(self, channels: Float[Tensor, "s m y x"]) -> None:
        """Take the slices of a scan, and run every batch that is now full."""
        self._waiting.append(channels)
        if sum(map(len, self._waiting)) >= self._size:
            slices = torch.cat(self._waiting)
            full = len(slices) // self._size * self._size
            for start in range(0, full, self._size):
                self._outputs.append(self._forward(slices[start : start + self._size]))
            self._waiting = [slices[full:]]

    def finish(self) -> list[Float32[np.ndarray, "s _"]]:
        """Run what is left; all rows, in the order added, one array a token."""
        slices = torch.cat(self._waiting) if self._waiting else None
        if slices is not None and len(slices):
            self._outputs.append(self._forward(slices))
        return [
            torch.cat(parts).to("cpu", torch.float32).numpy()
            for parts in zip(*self._outputs, strict=True)
        ]
