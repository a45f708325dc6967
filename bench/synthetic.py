"""Synthetic cohorts: a few sizes and a seed, to slice embeddings with planted findings, and labels.

The head has G regions, one below the other. A finding c belongs to one region g(c) and shows along
one direction v_c. A slice in region g of a scan with labels y is

    x = m_g + Σ_c (a_gc + SIGNAL·y_c·[g = g(c)]) v_c + Σ_c b_gc w_c + NOISE·ε

where m_g is the mark by which a slice shows its region and ε is normal in every slice. The normal
variation a, b of each region of a scan means nothing. Along v_c its variance is 1 in the region of
c and `conflict` in the others; what is missing to 1 there lies along w_c, which no finding uses. So
with conflict the same appearance is a finding in one region and nothing in the others, and without
it there is as much variation, which touches no finding. Directions and marks are orthogonal.

Scans are drawn in blocks, each from (seed, block), so that a cohort need not fit into memory. Not
here: unknown labels, findings that come together, patients with several scans.

Axes: n scans, r rows (slices of many scans, packed), d embedding, c findings, g regions.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Int64

from ctfm.store.features import FeatureStore
from ctfm.store.layout import StoredDtype
from ctfm.store.plan import SHARD_SCANS, ScanToStore, Shard
from ctfm.store.results import ScanResult
from ctfm.store.splits import SPLITS

SIGNAL = 2.0
"""What a finding adds, in standard deviations of the normal variation along its direction: who
reads that direction in its region alone reaches an AUC of Φ(SIGNAL / √2) = 0.921."""

NOISE = 0.25
"""Standard deviation of each number of a slice about its region."""

SLICE_MM = 4.0

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """What decides a synthetic cohort."""

    train: int
    """Scans of train; a patient has one."""

    validation: int

    test: int

    prevalences: tuple[float, ...]
    """Of each finding; finding c belongs to region c modulo `regions`."""

    dim: int
    """d, at least two for each finding and one for each region."""

    slices: int = 40
    """Most slices of a scan."""

    fewest_slices: int | None = None
    """Every number from here to `slices` is as likely; None is `slices` for every scan."""

    regions: int = 6

    conflict: float = 0.0
    """0..1: variance of the other regions along the direction of a finding."""

    mark: float = 5.0
    """Length of m_g; with 0 no slice shows its region."""

    seed: int = 0

    def __post_init__(self) -> None:
        directions = 2 * len(self.prevalences) + self.regions
        if self.dim < directions:
            raise ValueError(f"dim must be at least {directions} for these, got {self.dim}")
        if not 0 <= self.conflict <= 1:
            raise ValueError(f"conflict must be within 0..1, got {self.conflict}")
        if not self.regions <= self.least_slices <= self.slices:
            raise ValueError(
                f"a scan must have a slice in each of {self.regions} regions and at most "
                f"{self.slices} slices, got {self.least_slices}"
            )

    @property
    def scans(self) -> int:
        """Of all splits."""
        return self.train + self.validation + self.test

    @property
    def least_slices(self) -> int:
        """Of any scan."""
        return self.slices if self.fewest_slices is None else self.fewest_slices


class SyntheticCohort:
    """Labels, which are drawn at once, and embeddings, which are drawn when asked for.

    Args:
        config: What decides them.
    """

    y: Float32[np.ndarray, "n c"]
    """1 or 0."""

    offsets: Int64[np.ndarray, " n1"]
    """Scan i has the rows `offsets[i]` to `offsets[i + 1]`."""

    def __init__(self, config: CohortConfig) -> None:
        self.config = config
        c, g = len(config.prevalences), config.regions
        random = np.random.default_rng([config.seed, 0])
        gauss = random.standard_normal((config.dim, 2 * c + g))
        directions = np.linalg.qr(gauss)[0].T.astype(np.float32)
        self._basis, self._marks = directions[: 2 * c], config.mark * directions[2 * c :]
        self._own = np.arange(g)[:, None] == np.arange(c) % g
        self.y = (random.random((config.scans, c)) < config.prevalences).astype(np.float32)
        counts = random.integers(config.least_slices, config.slices + 1, size=config.scans)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    @property
    def findings(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(f"finding_{c:02d}" for c in range(self.y.shape[1]))

    @property
    def split(self) -> list[str]:
        """Of each scan: train comes first, then validation, then test."""
        sizes = (self.config.train, self.config.validation, self.config.test)
        return [name for name, size in zip(SPLITS, sizes, strict=True) for _ in range(size)]

    @property
    def scan_ids(self) -> list[str]:
        """Of each scan."""
        return [f"scan{i:06d}" for i in range(self.config.scans)]

    @cached_property
    def regions(self) -> Int64[np.ndarray, " r"]:
        """Region of each row."""
        counts = np.diff(self.offsets)
        within = np.arange(counts.sum()) - np.repeat(self.offsets[:-1], counts)
        regions: Int64[np.ndarray, " r"] = within * self.config.regions // np.repeat(counts, counts)
        return regions

    def rows(self, *, dtype: StoredDtype = "float16") -> torch.Tensor:
        """Embeddings (r, d) of all slices, in the type of a store."""
        made = torch.empty(len(self.regions), self.config.dim, dtype=getattr(torch, dtype))

        def fill(first: int) -> None:
            begin = self.offsets[first]
            block = self._block(first)
            made[begin : begin + len(block)] = block

        _in_threads(fill, range(0, self.config.scans, SHARD_SCANS))
        return made

    def write_store(
        self, folder: Path, *, dtype: StoredDtype = "float16"
    ) -> tuple[FeatureStore, Path]:
        """Write a finished feature store and a label table with a `split` column.

        Args:
            folder: Gets `features/` and `labels.parquet`.
            dtype: Type of the store.
        """
        scans = [
            ScanToStore(scan_id=scan, study_id=scan, patient_id=scan, max_rows=self.config.slices)
            for scan in self.scan_ids
        ]
        store = FeatureStore.create(
            folder / "features",
            settings={"backbone": "synthetic", **asdict(self.config)},
            tokens={"cls": self.config.dim},
            dtype=dtype,
            scans=scans,
            shard_scans=SHARD_SCANS,
        )
        _in_threads(lambda shard: self._write_shard(store, shard), store.pending_shards())
        store.finish()
        known = dict(zip(self.findings, self.y.T.astype(np.int8), strict=True))
        table = pa.table({"scan_id": self.scan_ids, "split": self.split, **known})
        pq.write_table(table, folder / "labels.parquet")
        return store, folder / "labels.parquet"

    def _write_shard(self, store: FeatureStore, shard: Shard) -> None:
        first = shard.index * SHARD_SCANS
        begins = self.offsets[first : first + len(shard.scans)] - self.offsets[first]
        parts = np.split(self._block(first).numpy(), begins[1:])
        results = [
            ScanResult(
                scan_id=scan.scan_id,
                rows={"cls": rows},
                position_mm=-SLICE_MM * (np.arange(len(rows), dtype=np.float32) + 0.5),
            )
            for scan, rows in zip(shard.scans, parts, strict=True)
        ]
        store.write_shard(shard, results)

    def _block(self, first: int) -> Float32[torch.Tensor, "r d"]:
        """Rows of `SHARD_SCANS` scans from `first` on, or of those that are left."""
        y = self.y[first : first + SHARD_SCANS]
        random = np.random.default_rng([self.config.seed, 1, first])
        shape = (len(y), *self._own.shape)
        along_v = np.where(self._own, 1.0, self.config.conflict**0.5) * random.normal(size=shape)
        along_w = np.where(self._own, 0.0, (1 - self.config.conflict) ** 0.5)
        along_w = along_w * random.normal(size=shape)
        along_v += SIGNAL * self._own * y[:, None]
        by_region = np.concatenate([along_v, along_w], -1).astype(np.float32) @ self._basis
        by_region += self._marks
        scans = np.diff(self.offsets[first : first + len(y) + 1])
        lines = slice(self.offsets[first], self.offsets[first + len(y)])
        place = np.repeat(np.arange(len(y)), scans) * shape[1] + self.regions[lines]
        noise = torch.Generator().manual_seed(int(random.integers(2**63)))
        rows = torch.empty(len(place), self.config.dim).normal_(std=NOISE, generator=noise)
        return rows.add_(torch.from_numpy(by_region.reshape(-1, self.config.dim)[place]))


def prevalences(findings: int, *, lowest: float, highest: float) -> tuple[float, ...]:
    """As many prevalences, in equal steps of their logarithm, the commonest first."""
    return tuple(np.geomspace(highest, lowest, findings).tolist())


def _in_threads(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """NumPy, torch and the store let go of the interpreter while they compute and write."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, items):
            pass
